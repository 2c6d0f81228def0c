"""Penalties of the reply's own tokens, and biases of tokens, against a loop that is written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastvlm import InputError
from fastvlm.decoding import (
    Autoregressive,
    Engine,
    LayerSkip,
    PromptLookup,
    Request,
    Sampler,
    SamplingParams,
    SelfSpeculative,
    Strategy,
)
from fastvlm.decoding.generation_config import processors_of, settings_of
from fastvlm.drafting import AdaptiveLength, ConfidenceLength, FixedLength
from fastvlm.functional.noise import gumbel
from fastvlm.language import SplitDecoder, split_decoder
from fastvlm.language.generator import end_tokens
from fastvlm.prompts import question
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import FAMILIES, finish, generate, imitation, inputs_of, text_model
from tests.models import small_vlm

PROMPTS = [[5, 9, 33, 7, 5, 9], [11, 12, 11, 12, 11], [60, 61, 62, 63]]
LIMIT = 20
CASES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.8},
    "reward": {"presence_penalty": -0.6, "frequency_penalty": -0.4},
    "bias": {"logit_bias": {5: 2.5, 9: -100, 33: 1, 96: 0.5}},
    "forced": {"logit_bias": {40: 100}},
    "all": {"presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {7: 2, 0: -3.5}},
}
SAMPLED = {"temperature": 0.7}


def naive_reply(
    model: PreTrainedModel, prompt: list[int], params: SamplingParams, **inputs: Any
) -> list[int]:
    """Decode one token after the other, each from a pass of the whole model over all before it."""
    reply: list[int] = []
    while len(reply) < LIMIT and end_tokens(model).isdisjoint(reply):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([[*prompt, *reply]]), **inputs).logits[0, -1]
        scores = scores.double()
        for token, bias in (params.logit_bias or {}).items():
            scores[token] += bias
        for token in set(reply):
            scores[token] -= (params.frequency_penalty or 0) * reply.count(token)
            scores[token] -= params.presence_penalty or 0
        if params.seed is not None:
            tokens = torch.arange(len(scores))
            noise = gumbel([params.seed], [len(reply)], tokens, torch.float64)
            scores = scores / params.temperature + noise[0]
        reply.append(int(scores.argmax()))
    return reply


def requests_of(
    decoder: SplitDecoder, strategy: Strategy, cases: list[tuple[list[int], SamplingParams]]
) -> list[Request]:
    """Return a request for each prompt, with the processors that its options ask for."""
    found = []
    for prompt, params in cases:
        config = settings_of(decoder.model, params)
        used = processors_of(decoder, config, params, prompt)
        sampler = Sampler(used, params.seed, prompt)
        inputs = inputs_of(decoder.model, prompt)
        found.append(Request(inputs, strategy, LIMIT, sampler, end_tokens(decoder.model)))
    return found


def strategies(model: PreTrainedModel) -> list[Strategy]:
    decoder = split_decoder(model)
    restricted = imitation(model, length=FixedLength(3))
    assert restricted.network is not None
    # Without token 96, whose column a bias must not look for here.
    restricted.network.draft_vocabulary = torch.arange(0, 95, 2)
    return [
        Autoregressive(),
        PromptLookup(FixedLength(4)),
        SelfSpeculative(decoder, 2, length=FixedLength(3)),
        LayerSkip(decoder, (1,), FixedLength(3)),
        imitation(model, exit_layer=2, perfect=True, length=FixedLength(6)),
        imitation(model, kind="mlp", length=ConfidenceLength(5, 0.1)),
        imitation(model, length=AdaptiveLength(6)),
        restricted,
    ]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", CASES)
def test_replies_are_those_of_a_naive_loop_under_every_strategy(
    name: str, seed: int | None
) -> None:
    model = text_model("qwen2")
    sampled = {} if seed is None else {**SAMPLED, "seed": seed}
    params = SamplingParams(**CASES[name], **sampled)
    expected = [naive_reply(model, prompt, params) for prompt in PROMPTS]
    free = SamplingParams(**sampled)
    assert expected != [naive_reply(model, prompt, free) for prompt in PROMPTS]
    decoder, accepted = split_decoder(model), 0
    for number, strategy in enumerate(strategies(model)):
        requests = requests_of(decoder, strategy, [(prompt, params) for prompt in PROMPTS])
        finish(Engine(decoder, max_slots=1 + number % 3), requests)
        assert [one.output_token_ids for one in requests] == expected
        accepted += sum(sum(one.accepted) for one in requests)
    assert accepted > 30, "hardly anything was drafted, so hardly anything was tested"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_rows_of_a_batch_have_penalties_of_their_own(family: str) -> None:
    model = text_model(family)
    some = [SamplingParams(**case) for case in CASES.values()]
    some += [SamplingParams(**CASES["all"], **SAMPLED, seed=seed) for seed in (1, 2)]
    cases = [
        (PROMPTS[row % 3], params) for row, params in enumerate([*some, SamplingParams(), *some])
    ]
    expected = [naive_reply(model, *case) for case in cases]
    decoder = split_decoder(model)
    for strategy in (PromptLookup(FixedLength(4)), imitation(model, exit_layer=2, perfect=True)):
        requests = requests_of(decoder, strategy, cases)
        finish(Engine(decoder), requests)
        assert [one.output_token_ids for one in requests] == expected


def test_a_perfect_draft_is_accepted_as_a_whole() -> None:
    """Drafted positions count the drafted tokens before them, as the verify does."""
    model = text_model("llama")
    decoder, params = split_decoder(model), SamplingParams(**CASES["frequency"])
    perfect = imitation(model, exit_layer=2, perfect=True, length=FixedLength(6))
    [request] = requests_of(decoder, perfect, [(PROMPTS[0], params)])
    finish(Engine(decoder), [request])
    assert request.accepted == request.proposed
    assert max(request.proposed) == 6


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}])
def test_a_bias_is_that_of_transformers(options: dict[str, Any]) -> None:
    model = text_model("llama")
    bias = CASES["bias"]["logit_bias"]
    sequences = {(token,): float(value) for token, value in bias.items()}
    expected = [generate(model, p, LIMIT, sequence_bias=sequences, **options) for p in PROMPTS]
    model.generation_config.update(**options)
    decoder, params = split_decoder(model), SamplingParams(logit_bias=bias)
    for strategy in (Autoregressive(), PromptLookup(FixedLength(4))):
        requests = requests_of(decoder, strategy, [(prompt, params) for prompt in PROMPTS])
        finish(Engine(decoder), requests)
        assert [one.output_token_ids for one in requests] == expected


def test_penalties_come_before_what_cuts_the_distribution() -> None:
    model = text_model("llama")
    params = SamplingParams(
        0.5, top_k=5, repetition_penalty=1.2, presence_penalty=1, logit_bias={3: 1}, seed=0
    )
    found = processors_of(split_decoder(model), settings_of(model, params), params, PROMPTS[0])
    names = [type(one).__name__ for one in found]
    assert names == [
        "LogitBias", "RepetitionPenaltyLogitsProcessor", "OccurrencePenalties",
        "TemperatureLogitsWarper", "TopKLogitsWarper",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


def test_an_image_asked_about_again_with_what_is_kept_of_its_prompt(
    vlm: VisionLanguageModel,
) -> None:
    image = render(sample(3), 128)
    for number, case in enumerate((CASES["frequency"], CASES["bias"], CASES["all"])):
        params = SamplingParams(**case, temperature=0.8, seed=number, max_new_tokens=LIMIT)
        request = vlm.request(
            "What is it?", image, temperature=0.8, seed=number, max_new_tokens=LIMIT, **case
        )
        finish(vlm.engine, [request])
        shown = vlm.prompts.inputs(question("What is it?", image))
        prompt = shown.pop("input_ids")[0].tolist()
        shown.pop("attention_mask", None)
        assert request.output_token_ids == naive_reply(vlm.model, prompt, params, **shown)
        assert bool(request.cached) == bool(number)
        for strategy in ("early-exit", "prompt-lookup", "layer-skip"):
            again = vlm.request(
                "What is it?", image, strategy=strategy, temperature=0.8, seed=number,
                max_new_tokens=LIMIT, **case,
            )  # fmt: skip
            finish(vlm.engine, [again])
            assert again.cached
            assert again.output_token_ids == request.output_token_ids


def test_an_earlier_reply_in_a_dialogue_is_part_of_the_prompt(vlm: VisionLanguageModel) -> None:
    first = vlm.generate("What is it?", max_new_tokens=12)
    dialogue: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.text}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    params = SamplingParams(presence_penalty=2, frequency_penalty=2)
    prompt = vlm.prompts.inputs(dialogue)["input_ids"][0].tolist()
    expected = naive_reply(vlm.model, prompt, params)
    found = vlm.generate(
        dialogue,
        presence_penalty=2,
        frequency_penalty=2,
        max_new_tokens=LIMIT,
        strategy="early-exit",
    )
    assert found.token_ids == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias"),
        ({"logit_bias": {5: True}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logit_bias": {10**6: 1}}, "1000000"),
    ],
)
def test_what_makes_no_sense_is_refused(
    vlm: VisionLanguageModel, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        vlm.generate("What is it?", **options)


def test_nothing_asked_for_costs_nothing(vlm: VisionLanguageModel) -> None:
    options = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}}
    assert vlm.request("What is it?", **options).sampler.is_greedy
