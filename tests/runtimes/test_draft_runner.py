"""Several draft steps in one graph, for targets that ONNX Runtime computes and that torch does."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper

from fastvlm.decoding import Autoregressive, Request, Sampler, SelfSpeculative
from fastvlm.decoding.engine import Engine
from fastvlm.decoding.strategies import Strategy
from fastvlm.drafting import ConfidenceLength, FixedLength
from fastvlm.drafting.draft_length import DraftLength
from fastvlm.language import split_decoder
from fastvlm.language.cache import DecoderCache
from fastvlm.language.decoder import SplitDecoder
from tests.language.decoding import decode, network
from tests.runtimes.conftest import CONFIGURATIONS, prompts, tiny

pytest.importorskip("onnxruntime")

from fastvlm.runtimes import draft_runner_of
from fastvlm.runtimes.decoder_forms import DecoderForms
from fastvlm.runtimes.draft_runner import DraftRunner
from fastvlm.runtimes.onnx_decoder import OnnxDecoder

TARGETS = ("torch", "onnx", "int8")


def target(model: PreTrainedModel, name: str) -> SplitDecoder:
    """Return a model's decoder in torch with drafts in ONNX Runtime, or all of it there."""
    split = split_decoder(model)
    if name != "torch":
        return OnnxDecoder(split, 8 if name == "int8" else None)
    split.ahead = DraftRunner(DecoderForms(split))
    return split


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    # Gemma multiplies its embeddings, and has windows and rotations of two kinds.
    return tiny(CONFIGURATIONS[request.param])


@pytest.mark.parametrize(("lengths", "behind"), [((9,), 0), ((9,), 3), ((9, 6, 7), 0)])
def test_steps_in_one_graph_are_those_one_by_one(
    lengths: tuple[int, ...], behind: int, model: PreTrainedModel
) -> None:
    # A chain has 8 bits whatever the decoder has; its steps attend to one position, not to two.
    decoder = target(model, "int8")
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    path = SelfSpeculative(decoder, 1, drafts).setup().path
    given, asked = prompts(decoder, lengths), [5 + row for row in range(len(lengths))]

    def filled(seen: int) -> tuple[DecoderCache, list[Tensor]]:
        cache, states = decoder.cache(len(lengths), 40), []
        for row, one in enumerate(given):
            cache.assign(row, one)
            positions = cache.positions([0], len(one), [row])
            decoder.forward_all(one.embeddings[None], positions, cache)
            exits = decoder.forward_layers(one.embeddings[None], positions, cache, range(1))
            positions = cache.positions([0], len(one) - seen, [row])
            drafts.imitate(exits[:, : len(one) - seen], positions, cache, decoder)
            states.append(exits[:, len(one) - seen :])
        return cache, states

    with torch.inference_mode():
        (cache, _), tokens, wanted = filled(0), asked, []
        for place in range(4):
            x = decoder.embed(torch.tensor(tokens)[:, None])
            positions = cache.positions([length + place for length in lengths], 1)
            logits = decoder.draft_step(x, positions, cache, path)[1][:, -1]
            chances, best = logits.softmax(-1).max(-1)
            tokens = path.tokens[best].tolist()
            wanted.append((tokens, chances.tolist()))
        cache, states = filled(behind)
        positions = cache.positions([length - behind for length in lengths], behind + 4)
        seen = torch.cat(states) if behind else None
        found = decoder.ahead.draft_ahead(asked, positions, cache, path, seen)
    assert [one for one, _ in found] == [one for one, _ in wanted]
    for (_, chances), (_, own) in zip(found, wanted, strict=True):
        assert chances == pytest.approx(own, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [[0], [0, 1, 2], [0, 2]])
def test_steps_beside_16_bits_are_those_one_by_one(
    slots: list[int], dtype: torch.dtype, model: PreTrainedModel
) -> None:
    own = deepcopy(model).to(dtype)
    decoder = split_decoder(own)
    ahead = decoder.ahead = draft_runner_of(decoder)
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    path = SelfSpeculative(decoder, 1, drafts).setup().path
    lengths, asked = (9, 70, 6), [5, 6, 7]
    starts = [lengths[slot] for slot in slots]

    def filled() -> DecoderCache:
        cache = decoder.cache(len(lengths), 80)
        for row, one in enumerate(prompts(decoder, lengths)):
            cache.assign(row, one)
            positions = cache.positions([0], len(one), [row])
            exits = decoder.forward_layers(one.embeddings[None], positions, cache, range(1))
            drafts.imitate(exits, positions, cache, decoder)
        return cache

    with torch.inference_mode():
        cache = filled()
        tokens = [asked[slot] for slot in slots]
        found = ahead.draft_ahead(tokens, cache.positions(starts, 4, slots), cache, path)
        other = filled()
        for place, (drafted, chances) in enumerate(found):
            x = decoder.embed(torch.tensor(tokens)[:, None])
            positions = other.positions([start + place for start in starts], 1, slots)
            logits = decoder.draft_step(x, positions, other, path)[1][:, -1].float()
            own_chances = logits.softmax(-1)[:, [path.tokens.tolist().index(t) for t in drafted]]
            # 8 bits of weights, and 16 of states.
            assert chances == pytest.approx(own_chances.diagonal().tolist(), rel=0.2)
            tokens = drafted
    # What was there stays to the bit, and what the steps have written is nearly alike.
    for layer, storage in cache.layers.items():
        for made, wanted in zip(
            (storage.keys, storage.values),
            (other.layers[layer].keys, other.layers[layer].values),
            strict=True,
        ):
            assert made.dtype == dtype
            for slot, length in enumerate(lengths):
                assert torch.equal(made[slot, :, :length], wanted[slot, :, :length])
            for slot, start in zip(slots, starts, strict=True):
                new = slice(start, start + 4)
                torch.testing.assert_close(
                    made[slot, :, new], wanted[slot, :, new], rtol=0.1, atol=0.1
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_drafts_beside_16_bits_are_accepted(dtype: torch.dtype, model: PreTrainedModel) -> None:
    own = deepcopy(model).to(dtype)
    decoder = split_decoder(own)
    decoder.ahead = draft_runner_of(decoder)
    perfect = network(decoder, "block", perfect=True, vocabulary=range(3, 90))
    drafting = SelfSpeculative(decoder, 1, perfect, FixedLength(5))
    made = decode(decoder, drafting, prompts(decoder, (9, 70, 6)), 30, ends=())
    assert decoder.ahead.prepared
    assert all(sum(one.accepted) > 0.3 * sum(one.proposed) for one in made)


@pytest.mark.parametrize("rule", [FixedLength(1), FixedLength(6), ConfidenceLength(8, 0.05)])
@pytest.mark.parametrize("kind", ["block", "mlp"])
@pytest.mark.parametrize("name", TARGETS)
def test_drafts_of_several_steps_at_once_change_nothing(
    kind: str, rule: DraftLength, name: str, model: PreTrainedModel
) -> None:
    decoder = target(model, name)
    drafts = network(decoder, kind, vocabulary=range(3, 90))
    several = SelfSpeculative(decoder, 1, drafts, rule)
    asked, drafted_ahead = prompts(decoder, (11, 7)), []
    original = decoder.ahead.draft_ahead

    def noted(*given: Any) -> Any:
        found = original(*given)
        drafted_ahead.append(len(found))
        return found

    decoder.ahead.draft_ahead = noted
    for given in asked:
        [plain] = decode(decoder, Autoregressive(), [given], 60, ends=())
        [made] = decode(decoder, several, [given], 60, ends=())
        assert made.output_token_ids == plain.output_token_ids
        assert sum(made.accepted) > 0 or kind == "mlp"
    assert sum(drafted_ahead) > 20


@pytest.mark.parametrize("name", ["torch", "onnx"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_several_steps_at_once_draw_as_the_target_does(
    temperature: float, name: str, model: PreTrainedModel
) -> None:
    decoder = target(model, name)
    perfect = network(decoder, "block", perfect=True, vocabulary=range(3, 90))
    warpers = [] if temperature == 1 else [TemperatureLogitsWarper(temperature)]
    found, accepted = [], []
    for drafting in (Autoregressive(), SelfSpeculative(decoder, 1, perfect, FixedLength(5))):
        for seed in range(4):
            sampler = Sampler(warpers, seed)
            made = Request(*prompts(decoder, (9,)), drafting, 40, sampler)
            Engine(decoder).run_all([made])
            found.append(made.output_token_ids)
            accepted.append(sum(made.accepted) / max(sum(made.proposed), 1))
    assert found[:4] == found[4:]
    assert len({tuple(reply) for reply in found}) == 4
    # The draft is the target but for its 8 bits and the tokens that it lacks.
    assert sum(accepted[4:]) / 4 > 0.5


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_rows_that_draw_and_others_draft_together(name: str, model: PreTrainedModel) -> None:
    decoder, rows = target(model, name), []
    perfect = network(decoder, "block", perfect=True, vocabulary=range(3, 90))
    kinds = [Sampler(), Sampler([], 1), Sampler([TemperatureLogitsWarper(0.7)], 2)]
    original = decoder.ahead.draft_ahead

    def noted(tokens: Any, *given: Any) -> Any:
        rows.append(len(tokens))
        return original(tokens, *given)

    decoder.ahead.draft_ahead = noted

    def asked(drafting: Strategy) -> list[Request]:
        given = prompts(decoder, (9, 9, 6))
        return [Request(one, drafting, 40, kind) for one, kind in zip(given, kinds, strict=True)]

    alone = [Engine(decoder).run_all([one])[0] for one in asked(Autoregressive())]
    together = asked(SelfSpeculative(decoder, 1, perfect, FixedLength(5)))
    Engine(decoder).run_all(together)
    assert [one.output_token_ids for one in together] == [one.output_token_ids for one in alone]
    assert all(sum(one.accepted) > 0.4 * sum(one.proposed) for one in together)
    assert rows.count(3) > 2


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_strategies_of_a_draft_share_its_graphs(name: str, model: PreTrainedModel) -> None:
    decoder = target(model, name)
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    for tokens in range(1, 12):
        several = SelfSpeculative(decoder, 1, drafts, FixedLength(tokens))
        decode(decoder, several, prompts(decoder, (9,)), 12, ends=())
    assert len(decoder.ahead._kept) == 1


@torch.no_grad()
def test_weights_that_change_are_followed_beside_torch() -> None:
    own = tiny(CONFIGURATIONS["qwen2"])
    decoder = target(own, "torch")
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    path, cache = SelfSpeculative(decoder, 1, drafts).setup().path, decoder.cache(1, 8)
    [given] = prompts(decoder, (3,))
    cache.assign(0, given)

    def chances() -> list[float]:
        with torch.inference_mode():
            decoder.forward_all(given.embeddings[None], cache.positions([0], 3), cache)
            found = decoder.ahead.draft_ahead([5], cache.positions([3], 2), cache, path)
        return [chance for _, [chance] in found]

    known = chances()
    decoder.follow()
    assert chances() == known
    for weight in (next(drafts.layers.parameters()), decoder.layers[0].mlp.down_proj.weight):
        weight.mul_(0.5)
        decoder.follow()
        before, known = known, chances()
        assert before != known


def test_a_model_that_is_cast_has_its_drafts_from_torch() -> None:
    own = tiny(CONFIGURATIONS["qwen2"])
    decoder = target(own, "torch")
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    several = SelfSpeculative(decoder, 1, drafts, FixedLength(3))
    decode(decoder, several, prompts(decoder, (9,)), 12, ends=())
    assert decoder.ahead._kept
    own.to(torch.float64)
    given = prompts(decoder, (9,))
    [plain], [made] = (
        decode(decoder, one, given, 20, ends=()) for one in (Autoregressive(), several)
    )
    assert made.output_token_ids == plain.output_token_ids
    assert not decoder.ahead._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_offloaded_model_has_its_drafts_from_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    own = tiny(CONFIGURATIONS["qwen2"], dtype)
    drafts = network(split_decoder(own), "block", vocabulary=range(3, 90))
    disk_offload(own, str(tmp_path), execution_device=torch.device("cpu"))
    decoder = split_decoder(own)
    ahead = decoder.ahead = draft_runner_of(decoder)
    several = SelfSpeculative(decoder, 1, drafts, FixedLength(3))
    [made] = decode(decoder, several, prompts(decoder, (9,)), 20, ends=())
    assert len(made.output_token_ids) == 20
    assert sum(made.proposed)
    assert not ahead.prepared
