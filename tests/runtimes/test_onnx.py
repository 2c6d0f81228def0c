"""Decoding in ONNX Runtime: the tokens of torch, and its own to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvlm.decoding import Request, Sampler, SelfSpeculative
from fastvlm.decoding.engine import Engine
from fastvlm.drafting import FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language import DecoderInputs, split_decoder
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath
from tests.language.decoding import STRATEGIES, decode, network, strategy
from tests.runtimes.conftest import (
    CONFIGURATIONS,
    LIMIT,
    OTHERS,
    VOCABULARY,
    prompts,
    replies,
    tiny,
)

pytest.importorskip("onnxruntime")

from fastvlm.runtimes.decoder_forms import DecoderForms
from fastvlm.runtimes.layer_form import GraphLayer
from fastvlm.runtimes.onnx_decoder import OnnxDecoder
from fastvlm.runtimes.runtime import RuntimeOptions, onnx_decoder


def set_largest(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    for module in ("onnx_decoder", "draft_runner"):
        monkeypatch.setattr(f"fastvlm.runtimes.{module}.LARGEST", largest)


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_tokens_are_those_of_generate(family: str) -> None:
    model = tiny(CONFIGURATIONS[family])
    decoder = onnx_decoder(model, RuntimeOptions())
    given = prompts(decoder, (11, 4))
    found = replies(decoder, "block", given)
    model.generation_config.eos_token_id = None
    for inputs, reply in zip(given, found, strict=True):
        ids = torch.tensor([inputs.token_ids])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=LIMIT)
        assert len(set(reply)) > 1
        assert reply == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("largest", [0, 2**24])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@torch.inference_mode()
def test_rounding_depends_on_neither_width_nor_batch(
    family: str, bits: int | None, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_largest(monkeypatch, largest)
    model = tiny(CONFIGURATIONS[family])
    decoder = OnnxDecoder(split_decoder(model), bits)
    tokens = torch.randint(3, VOCABULARY, (3, 20))
    starts = (9, 12, 10)

    def filled(slots: int) -> object:
        cache = decoder.cache(slots, 20)
        for slot in range(slots):
            cache.assign(slot, DecoderInputs(tokens[slot].tolist(), torch.zeros(20, 1)))
        return cache

    def pass_over(cache: object, rows: Sequence[int], begin: Sequence[int], width: int) -> Tensor:
        some = [tokens[row, start : start + width] for row, start in zip(rows, begin, strict=True)]
        positions = cache.positions(begin, width, rows)
        embedded = decoder.embed(torch.stack(some))
        exits, logits = decoder.forward_all(embedded, positions, cache, 2, logits=True)
        same, x = decoder.forward_all(embedded, positions, cache, 2)
        assert torch.equal(same, exits)
        assert torch.equal(decoder.head(x), logits)
        token_ids = [row.tolist() for row in some]
        begun = decoder.forward_tokens(token_ids, positions, cache, 2)
        assert all(map(torch.equal, begun, (exits, logits)))
        if largest:
            # Where all layers are one graph, an exit changes nothing.
            _, last = decoder.forward_all(embedded, positions, cache)
            assert torch.equal(last, x)
            first = decoder.forward_layers(embedded, positions, cache, range(2))
            assert torch.equal(first, exits)
        return logits

    single, several, gaps = filled(3), filled(3), filled(3)
    for row, start in enumerate(starts):
        for cache in (single, several, gaps):
            pass_over(cache, [row], [0], start)
    alone = [
        torch.cat([pass_over(single, [row], [start + step], 1) for step in range(5)], 1)
        for row, start in enumerate(starts)
    ]
    together = pass_over(several, [0, 1, 2], starts, 5)
    assert torch.equal(together, torch.cat(alone))
    # Rows that don't lie side by side.
    apart = pass_over(gaps, [0, 2], [starts[0], starts[2]], 5)
    assert torch.equal(apart, torch.cat((alone[0], alone[2])))
    # And what these rows wrote back is read by the next pass.
    after = [pass_over(cache, [2], [starts[2] + 5], 1) for cache in (single, gaps)]
    assert torch.equal(*after)


@pytest.mark.parametrize("largest", [0, 2**24])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_every_strategy_gives_the_same_tokens(
    qwen: PreTrainedModel, bits: int | None, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_largest(monkeypatch, largest)
    decoder = OnnxDecoder(split_decoder(qwen), bits)
    given = prompts(decoder, (11, 4, 7, 9))
    wanted = [replies(decoder, "autoregressive", [one])[0] for one in given]
    for name in STRATEGIES:
        assert replies(decoder, name, given) == wanted, name


@pytest.mark.parametrize("bits", [None, 4])
def test_sampled_tokens_are_the_same_with_drafts(qwen: PreTrainedModel, bits: int | None) -> None:
    decoder = OnnxDecoder(split_decoder(qwen), bits)
    inputs = prompts(decoder, (11, 6))

    def sampled(name: str, given: Sequence[DecoderInputs], seed: int) -> list[list[int]]:
        from fastvlm.decoding import SamplingParams
        from fastvlm.decoding.generation_config import processors_of, settings_of

        params = SamplingParams(0.8, seed=seed, max_new_tokens=LIMIT)
        drafts, made = strategy(name, decoder), []
        for row, one in enumerate(given):
            settings = settings_of(qwen, params)
            processors = processors_of(decoder, settings, params, one.token_ids)
            sampler = Sampler(processors, seed + row, one.token_ids)
            made.append(Request(one, drafts, LIMIT, sampler, end_token_ids=frozenset()))
        for request in Engine(decoder).run(made):
            assert request.error is None
        return [request.output_token_ids for request in made]

    wanted = [sampled("autoregressive", [one], 5 + row)[0] for row, one in enumerate(inputs)]
    greedy = replies(decoder, "autoregressive", inputs)
    assert wanted != greedy
    for name in ("perfect", "block", "early-exit", "prompt-lookup"):
        assert sampled(name, inputs, 5) == wanted, name


def test_graphs_that_are_made_again_change_nothing(
    qwen: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm.runtimes.layer_stack.MOST_GRAPHS", 1)
    decoder = OnnxDecoder(split_decoder(qwen))
    given = prompts(decoder, (11, 4))
    wanted = [replies(decoder, "autoregressive", [one])[0] for one in given]
    for name in ("layer-skip", "block", "early-exit"):
        assert replies(decoder, name, given) == wanted, name


def draft_path(
    decoder: SplitDecoder, kind: str, exit_layer: int
) -> tuple[DraftPath, Sequence[nn.Module]]:
    """Return what a draft step runs, and the modules that a strategy would keep."""
    made = network(decoder, kind, vocabulary=range(7, 50), exit_layer=exit_layer)
    rows = decoder.lm_head_rows(made.draft_vocabulary)
    return DraftPath(exit_layer, list(made.layers), made.mlp, rows), [made]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", ["block", "mlp"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "olmo2"])
@torch.inference_mode()
def test_a_draft_step_in_one_graph(family: str, kind: str, bits: int | None) -> None:
    model = tiny(CONFIGURATIONS[family])
    decoder = OnnxDecoder(split_decoder(model), bits)
    path, _ = draft_path(decoder, kind, 2)
    tokens = torch.randint(3, VOCABULARY, (3, 20))
    found = []
    for step in (decoder.draft_step, super(OnnxDecoder, decoder).draft_step):
        cache = decoder.cache(3, 24)
        for slot in range(3):
            cache.assign(slot, DecoderInputs(tokens[slot].tolist(), torch.zeros(20, 1)))
        made = []
        for rows, starts in (([0], [0]), ([0, 1, 2], [1, 0, 0]), ([0, 2], [2, 1]), ([1], [1])):
            for number in range(9):
                here = [start * 9 + number for start in starts]
                x = decoder.embed(tokens[rows, number][:, None])
                made.append(
                    step(x, cache.positions([min(p, 20) for p in here], 1, rows), cache, path)
                )
        found.append(made)
    for (exits, logits), (own_exits, own_logits) in zip(*found, strict=True):
        assert torch.equal(exits, own_exits)
        if kind == "mlp" and bits:
            continue  # by itself it has weights of 32 bits
        torch.testing.assert_close(logits, own_logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_drafts_weights_that_change_are_followed(qwen: PreTrainedModel) -> None:
    decoder = OnnxDecoder(split_decoder(qwen))
    cache = decoder.cache(1, 8)
    cache.assign(0, DecoderInputs([5], torch.zeros(1, 1)))
    x, positions = decoder.embed(torch.tensor([[5]])), cache.positions([0], 1)
    for kind in ("block", "mlp"):
        path, [made] = draft_path(decoder, kind, 1)
        _, before = decoder.draft_step(x, positions, cache, path)
        for weight in made.parameters():
            weight.mul_(0.5)
        decoder.follow()
        _, after = decoder.draft_step(x, positions, cache, path)
        assert not torch.allclose(before, after)
        _, wanted = SplitDecoder.draft_step(decoder, x, positions, cache, path)
        torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest", [0, 2**24])
@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_drafts_of_few_tokens_change_nothing(
    qwen: PreTrainedModel, kind: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_largest(monkeypatch, largest)
    decoder = OnnxDecoder(split_decoder(qwen))
    given = prompts(decoder, (11, 4, 7, 9))
    wanted = [replies(decoder, "autoregressive", [one])[0] for one in given]
    drafts = network(decoder, kind, vocabulary=range(3, 90))
    several = SelfSpeculative(decoder, 1, drafts, FixedLength(3))
    done = decode(decoder, several, given, LIMIT, ends=())
    assert [request.output_token_ids for request in done] == wanted
    assert sum(sum(request.proposed) for request in done) > LIMIT


@pytest.mark.parametrize("tokens", [1, 2])
def test_small_layers_draft_what_large_ones_do(
    qwen: PreTrainedModel, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for largest in (0, 2**24):
        set_largest(monkeypatch, largest)
        decoder = OnnxDecoder(split_decoder(qwen))
        drafts = network(decoder, "block", vocabulary=range(3, 90))
        several = SelfSpeculative(decoder, 1, drafts, FixedLength(tokens))
        done = decode(decoder, several, prompts(decoder, (11, 4, 7)), 40, ends=())
        found.append([(one.output_token_ids, one.proposed, one.accepted) for one in done])
    assert found[0] == found[1]
    # Whole drafts were accepted, after which the network has a token more to see.
    assert any(count == tokens for _, _, accepted in found[0] for count in accepted)


def test_a_little_memory_stays_for_the_next_request(
    qwen: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(qwen.config)
    decoder = OnnxDecoder(split_decoder(model))
    engine = Engine(decoder)

    def reply(length: int) -> list[int]:
        made = Request(*prompts(decoder, (length,)), strategy("block", decoder), LIMIT)
        [done] = engine.run_all([made])
        assert done.error is None
        return done.output_token_ids

    wanted = reply(11)
    first = engine.cache
    assert first.nbytes > 0
    assert reply(11) == wanted
    assert engine.cache is first
    # It would be too small for this one, and what this one leaves is no smaller.
    longer = reply(200)
    second = engine.cache
    assert second is not first
    assert reply(11) == wanted
    assert engine.cache is second
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    last = engine.cache
    assert reply(200) != longer
    assert engine.cache is not last
    monkeypatch.setattr("fastvlm.runtimes.onnx_decoder.IDLE_CACHE_BYTES", 0)
    assert reply(11) != wanted
    assert engine.cache.nbytes == 0


def test_states_added_after_layers(qwen: PreTrainedModel) -> None:
    split = split_decoder(qwen)
    decoder = OnnxDecoder(split)
    [plain] = prompts(split, (9,))
    added = {layer: torch.randn(9, split.width) for layer in (-1, 0, 2)}
    inputs = DecoderInputs(plain.token_ids, plain.embeddings, injections=added)
    found = []
    for one in (split, decoder):
        cache = one.cache(1, 12)
        cache.assign(0, inputs)
        positions = cache.positions([0], 9)
        with torch.inference_mode():
            found.append(one.forward_layers(plain.embeddings[None], positions, cache, range(4)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_weights_that_change_are_followed(qwen: PreTrainedModel) -> None:
    model = tiny(qwen.config)
    decoder = OnnxDecoder(split_decoder(model))
    given = prompts(decoder, (8,))
    before = replies(decoder, "early-exit", given)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(-1)
    after = replies(decoder, "early-exit", given)
    assert after != before
    assert after == replies(split_decoder(model), "autoregressive", given)


@torch.inference_mode()
def test_rotations_and_embeddings_that_change_are_followed(qwen: PreTrainedModel) -> None:
    model = tiny(qwen.config)
    decoder = OnnxDecoder(split_decoder(model))
    given = prompts(decoder, (8,))
    found = [replies(decoder, "block", given)]
    model.model.rotary_emb.inv_freq.mul_(0.25)
    found.append(replies(decoder, "block", given))
    model.model.embed_tokens.weight[3:] = model.model.embed_tokens.weight[3:].flip(0)
    found.append(replies(decoder, "block", given))
    # A hook does more than looking rows up.
    model.model.embed_tokens.register_forward_hook(lambda _, __, states: -states)
    found.append(replies(decoder, "block", given))
    assert all(one != other for one, other in pairwise(found))
    assert found[-1] == replies(split_decoder(model), "autoregressive", given)


@pytest.mark.parametrize("family", OTHERS)
def test_another_form_is_refused(family: str) -> None:
    model = tiny(OTHERS[family])
    with pytest.raises(InputError, match=r"^ONNX Runtime can't decode .* runtime='torch'\.$"):
        onnx_decoder(model, RuntimeOptions())


def test_another_precision_is_refused(qwen: PreTrainedModel) -> None:
    model = tiny(qwen.config, torch.bfloat16)
    with pytest.raises(InputError, match="computes in float32"):
        OnnxDecoder(split_decoder(model))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_wrong_states_are_refused(
    qwen: PreTrainedModel, quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DecoderForms.layer

    def wrong(self: DecoderForms, number: int) -> GraphLayer:
        found = read(self, number)
        norm = found.form.norms["before_mlp"]
        found.form.norms["before_mlp"] = replace(norm, weight=norm.weight * 1.01)
        return found

    monkeypatch.setattr(DecoderForms, "layer", wrong)
    with pytest.raises(InputError, match="differ from those in torch"):
        onnx_decoder(qwen, RuntimeOptions(quantize=quantize))
