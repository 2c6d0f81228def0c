"""Sampling has the target's own distribution, whatever is drafted: chi-squared at every position.

The expected distribution comes from transformers' own model and logits processors, each prefix
computed by itself.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import logits_process as processing

from fastvlm.decoding import Drafter, PromptLookup
from fastvlm.decoding import selection as selecting
from fastvlm.decoding.selection import LogitsProcessor, Selection
from fastvlm.drafting import FixedLength
from fastvlm.functional import acceptance
from tests.decoding.conftest import SMALL, decode, imitation

VOCABULARY, LENGTH, BATCH = 6, 4, 500
PROMPT = [2, 3, 4, 2, 3]


def even_is_dearer(tokens: Tensor, scores: Tensor) -> Tensor:
    """A processor of a user's own, which looks at the prefix."""
    bias = torch.zeros_like(scores)
    bias[:, ::2] = 0.7 * (tokens.shape[1] % 3) - 0.3 * int(tokens[0, -1])
    return scores + bias


CASES: dict[str, list[LogitsProcessor]] = {
    "nothing": [],
    "temperature": [processing.TemperatureLogitsWarper(0.6)],
    "top-k": [processing.TopKLogitsWarper(3)],
    "top-p": [processing.TopPLogitsWarper(0.8)],
    "min-p": [processing.MinPLogitsWarper(0.05)],
    "repetition penalty": [processing.RepetitionPenaltyLogitsProcessor(1.8)],
    "a user's own": [even_is_dearer],
    "several": [
        processing.RepetitionPenaltyLogitsProcessor(1.3),
        processing.TemperatureLogitsWarper(1.4),
        processing.TopPLogitsWarper(0.9),
    ],
}


def tiny_model() -> PreTrainedModel:
    """Return a model of few tokens, whose distributions are neither flat nor sharp."""
    torch.manual_seed(8)
    options = {**SMALL, "vocab_size": VOCABULARY, "num_hidden_layers": 3, "hidden_size": 16}
    config = AutoConfig.for_model("qwen2", **options, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.lm_head.weight.data *= 2.5
    return model


def expected(model: PreTrainedModel, processors: Sequence[LogitsProcessor]) -> list[Tensor]:
    """Return the probability of each beginning of a reply, by its length: (6,), (36,), ..."""
    levels = [torch.ones(1, dtype=torch.float64)]
    for length in range(LENGTH):
        rows = []
        for reply in itertools.product(range(VOCABULARY), repeat=length):
            tokens = torch.tensor([[*PROMPT, *reply]])
            with torch.no_grad():
                scores = model(tokens).logits[:, -1]
            for processor in processors:
                scores = processor(tokens, scores.clone())
            rows.append(scores[0].softmax(-1))
        levels.append((levels[-1][:, None] * torch.stack(rows)).flatten())
    return levels[1:]


def surprise(counts: Counter[int], probabilities: Tensor, total: int) -> float:
    """Return by how many standard deviations chi-squared exceeds what it should be.

    (Wilson and Hilferty 1931.) What is expected less than five times is counted together.
    """
    cells: dict[int, list[float]] = {}
    for index, probability in enumerate(probabilities.tolist()):
        if not probability:
            assert not counts[index], "a token that can't be was drawn"
            continue
        cell = cells.setdefault(index if probability * total > 5 else -1, [0.0, 0.0])
        cell[0] += counts[index]
        cell[1] += probability * total
    chi = sum((seen - due) ** 2 / due for seen, due in cells.values())
    freedom = len(cells) - 1
    if not freedom:
        return 0.0
    spread = 2 / (9 * freedom)
    return ((chi / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def worst(
    model: PreTrainedModel,
    drafter: Drafter,
    processors: Sequence[LogitsProcessor],
    replies: int,
    levels: list[Tensor],
) -> float:
    """Return the largest surprise of any position."""
    torch.manual_seed(13)
    counts: list[Counter[int]] = [Counter() for _ in range(LENGTH)]
    accepted = 0
    for _ in range(replies // BATCH):
        selection = Selection(processors, sample=True, prompt=PROMPT)
        for request in decode(model, drafter, [PROMPT] * BATCH, LENGTH, selection=selection):
            accepted += sum(request.accepted)
            code = 0
            for position, token in enumerate(request.reply):
                code = code * VOCABULARY + token
                counts[position][code] += 1
    assert accepted > replies // 10, "hardly anything was drafted, so hardly anything was tested"
    return max(surprise(count, level, replies) for count, level in zip(counts, levels, strict=True))


def drafters(model: PreTrainedModel) -> dict[str, Drafter]:
    """Return a drafter that draws and one that doesn't."""
    return {"imitation": imitation(model, length=FixedLength(3)), "lookup": PromptLookup(3, 1)}


@pytest.mark.parametrize("name", CASES)
def test_replies_have_the_targets_distribution(name: str) -> None:
    model = tiny_model()
    levels = expected(model, CASES[name])
    for drafter in drafters(model).values():
        assert worst(model, drafter, CASES[name], 2000, levels) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_replies_have_the_targets_distribution(name: str) -> None:
    """200,000 tokens a case."""
    model = tiny_model()
    levels = expected(model, CASES[name])
    for drafter in drafters(model).values():
        assert worst(model, drafter, CASES[name], 200_000 // LENGTH, levels) < 4


def accept_always(token: int, p: Tensor, q: Tensor | None, *_: object) -> None:
    """A wrong rule."""


@pytest.mark.parametrize("bug", ["accepts always", "replaces by the target's distribution"])
@pytest.mark.parametrize("drafter", ["imitation", "lookup"])
def test_a_wrong_rule_is_found_out(bug: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would fail if acceptance were wrong."""
    if bug == "accepts always":
        monkeypatch.setattr(selecting, "accept_or_replace", accept_always)
    else:
        monkeypatch.setattr(acceptance, "residual", lambda p, _: p)
    model = tiny_model()
    assert worst(model, drafters(model)[drafter], [], 2000, expected(model, [])) > 10


def test_a_residual_without_weight_is_the_targets_distribution() -> None:
    p = torch.tensor([0.5, 0.5, 0.0])
    assert torch.equal(acceptance.residual(p, p.clone()), p)
    assert acceptance.residual(p, torch.tensor([0.2, 0.8, 0.0])).tolist() == pytest.approx(
        [0.3, 0, 0]
    )


def test_a_seed_reproduces_a_reply_in_any_company() -> None:
    model = tiny_model()

    def selections(seeds: list[int]) -> list[Selection]:
        return [
            Selection(sample=True, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]

    def replies(seeds: list[int]) -> list[list[int]]:
        from fastvlm.decoding import Decoding, Request
        from fastvlm.language import split_decoder

        embeddings = model.get_input_embeddings()(torch.tensor(PROMPT)).detach()
        requests = [
            Request(PROMPT, embeddings, 20, selection=selection) for selection in selections(seeds)
        ]
        for _ in Decoding(split_decoder(model), imitation(model, length=FixedLength(3)), requests):
            pass
        return [request.reply for request in requests]

    alone = replies([1])
    assert alone == replies([1])
    assert alone != replies([2])


@pytest.mark.parametrize("name", [name for name in CASES if "top" not in name])
def test_greedy_decoding_with_processors_is_generates(name: str) -> None:
    model = tiny_model()
    processors = CASES[name]
    tokens = torch.tensor([PROMPT])
    best = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=30,
        do_sample=False,
        logits_processor=processing.LogitsProcessorList(processors),
        eos_token_id=None,
    )[0, len(PROMPT) :].tolist()
    for drafter in drafters(model).values():
        selection = Selection(processors, prompt=PROMPT)
        [request] = decode(model, drafter, [PROMPT], 30, selection=selection)
        assert request.reply == best
