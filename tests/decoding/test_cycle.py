"""The engine against transformers' own generate, and against recomputation from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import FastVlmForConditionalGeneration, PreTrainedModel

from fastvlm.decoding import (
    Autoregressive,
    Engine,
    PromptLookup,
    Request,
    SelfSpeculative,
    Strategy,
)
from fastvlm.decoding.batch import Batch
from fastvlm.decoding.history import Copy
from fastvlm.decoding.lookup import Lookup
from fastvlm.drafting import AdaptiveLength, ConfidenceLength, FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language import DecoderInputs, split_decoder
from fastvlm.language.decoder import cache_name
from tests.decoding.conftest import (
    FAMILIES,
    decode,
    finish,
    generate,
    imitation,
    inputs_of,
    text_model,
)

PROMPTS = [[5, 9, 33, 7], [11, 12, 11, 12, 11], [40, 3, 8, 60, 21, 22, 23, 50, 51], [6]]
STRATEGIES = (
    "autoregressive",
    "lookup",
    "early exit",
    "block",
    "two blocks",
    "mlp",
    "confidence",
    "perfect",
    "cascade",
    "adaptive cascade",
)


class Rarely(Lookup):
    """Copies where the history's length is odd: before a draft, after some of its steps, never."""

    def copies(
        self, batch: Batch, drafts: Sequence[Sequence[int]], most: Sequence[int]
    ) -> list[Copy | None]:
        found = super().copies(batch, drafts, most)
        lengths = map(sum, zip(batch.lengths, map(len, drafts), strict=True))
        return [copy if n % 2 else None for copy, n in zip(found, lengths, strict=True)]


def strategy(name: str, model: PreTrainedModel) -> Strategy:
    decoder = split_decoder(model)
    made = {
        "autoregressive": Autoregressive,
        "lookup": lambda: PromptLookup(FixedLength(5)),
        "early exit": lambda: SelfSpeculative(decoder, 2, length=FixedLength(3)),
        "block": lambda: imitation(model, length=FixedLength(4)),
        "two blocks": lambda: imitation(model, blocks=2, exit_layer=2, length=FixedLength(1)),
        "mlp": lambda: imitation(model, kind="mlp", exit_layer=3, length=FixedLength(2)),
        "confidence": lambda: imitation(model, length=ConfidenceLength(6, 0.3)),
        "perfect": lambda: imitation(model, exit_layer=2, perfect=True, length=FixedLength(6)),
        "cascade": lambda: imitation(model, length=ConfidenceLength(4, 0.2), lookup=Rarely()),
        "adaptive cascade": lambda: imitation(model, length=AdaptiveLength(6), lookup=Lookup()),
    }
    return made[name]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_greedy_tokens_equal_generates(family: str, name: str) -> None:
    model = text_model(family)
    expected = [generate(model, prompt, 24) for prompt in PROMPTS]
    ends = frozenset({1})
    alone = [
        decode(model, strategy(name, model), [prompt], 24, end_token_ids=ends)[0].output_token_ids
        for prompt in PROMPTS
    ]
    assert alone == expected
    # Rows of different prompts, which accept different numbers and end at different times.
    together = decode(model, strategy(name, model), PROMPTS, 24, end_token_ids=ends)
    assert [request.output_token_ids for request in together] == expected


def test_permuting_rows_changes_nothing() -> None:
    model = text_model("qwen2")
    straight = decode(model, strategy("block", model), PROMPTS, 20)
    turned = decode(model, strategy("block", model), PROMPTS[::-1], 20)
    assert [r.output_token_ids for r in straight] == [r.output_token_ids for r in turned][::-1]
    assert [r.accepted for r in straight] == [r.accepted for r in turned][::-1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-sliding"])
def test_a_perfect_draft_is_accepted_whole(family: str) -> None:
    model = text_model(family)
    for request in decode(model, strategy("perfect", model), PROMPTS, 30):
        assert request.accepted == request.proposed
        assert sum(request.proposed) > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_after_every_commit_the_cache_is_what_recomputing_gives(name: str) -> None:
    model = text_model("qwen2")
    engine = Engine(split_decoder(model))
    for prompt in PROMPTS:
        engine.add(Request(inputs_of(model, prompt), strategy(name, model), 18))
    steps = 0
    while engine.step():
        steps += bool(engine.slots)
        for slot in engine.slots:
            history = [*slot.request.prompt_token_ids, *slot.request.output_token_ids]
            assert slot.length == len(history) - 1
            whole = model(torch.tensor([history[:-1]]), use_cache=True)[cache_name(model)]
            for layer in range(engine.decoder.depth):
                expected, found = whole.layers[layer], engine.cache.layers[layer]
                for tensor, ours in ((expected.keys, found.keys), (expected.values, found.values)):
                    torch.testing.assert_close(ours[slot.index, :, : slot.length], tensor[0])
    assert steps > 2


def test_an_imitation_block_sees_what_teacher_forcing_shows_it() -> None:
    """The block's own cache, too, is what one pass over the whole reply gives."""
    model = text_model("qwen2")
    decoder = split_decoder(model)
    drafter = strategy("block", model)
    requests = decode(model, drafter, PROMPTS[:1], 25)
    network = drafter.network
    tokens = torch.tensor([PROMPTS[0] + requests[0].output_token_ids[:-1]])
    cache = decoder.cache(1, tokens.shape[1])
    positions = cache.positions([0], tokens.shape[1])
    with torch.inference_mode():
        x = decoder.forward_layers(decoder.embed(tokens), positions, cache, range(1))
        guesses = decoder.head(network.imitate(x, positions, cache, decoder)).argmax(-1)[0].tolist()
    # Replay: wherever a draft's first token was proposed, teacher forcing proposes the same.
    position = len(PROMPTS[0])
    reply = requests[0].output_token_ids
    for proposed, accepted in zip(requests[0].proposed, requests[0].accepted, strict=True):
        for offset in range(accepted):
            assert guesses[position + offset] == reply[position + offset - len(PROMPTS[0]) + 1]
        if accepted < proposed:
            missed = reply[position + accepted - len(PROMPTS[0]) + 1]
            assert guesses[position + accepted] != missed
        position += accepted + 1


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_the_token_limit_cuts_inside_a_draft(name: str, limit: int) -> None:
    model = text_model("llama")
    for request in decode(model, strategy(name, model), PROMPTS, limit):
        assert len(request.output_token_ids) == limit


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_end_token_inside_a_draft_ends_the_reply(name: str) -> None:
    model = text_model("llama")
    free = generate(model, PROMPTS[0], 20, eos_token_id=None)
    for end in set(free):
        [request] = decode(
            model, strategy(name, model), PROMPTS[:1], 20, end_token_ids=frozenset({end})
        )
        assert request.output_token_ids == free[: free.index(end) + 1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_image_in_the_prompt(name: str, vision_model: FastVlmForConditionalGeneration) -> None:
    model = vision_model
    pixels = torch.rand(3, 3, 128, 128, dtype=torch.float64)
    prompts = [[4, *[96] * 4, 7, 8], [4, *[96] * 4, 9], [5, 6, *[96] * 4, 30, 31, 32]]
    drafting = strategy(name, model)
    with torch.inference_mode():
        features = model.get_image_features(pixels).pooler_output
    requests, expected = [], []
    for row, prompt in enumerate(prompts):
        embeddings = model.get_input_embeddings()(torch.tensor(prompt)).detach()
        embeddings[torch.tensor(prompt) == 96] = features[row]
        inputs = DecoderInputs(prompt, embeddings)
        requests.append(Request(inputs, drafting, 16, end_token_ids=frozenset({1})))
        expected.append(generate(model, prompt, 16, pixel_values=pixels[row : row + 1]))
    finish(Engine(split_decoder(model)), requests)
    assert [request.output_token_ids for request in requests] == expected
    if name == "perfect":
        assert all(request.accepted == request.proposed for request in requests)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    model = text_model("llama")
    with pytest.raises(InputError, match="256"):
        decode(model, Autoregressive(), [[5] * 256], 4)


def test_a_reply_goes_beyond_the_context_as_generates_does() -> None:
    model = text_model("llama")
    [request] = decode(model, imitation(model), [[5] * 250], 50)
    assert request.output_token_ids == generate(model, [5] * 250, 50, eos_token_id=None)


def test_an_unknown_family_is_named() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=10))
    with pytest.raises(InputError, match="mamba"):
        split_decoder(model)
