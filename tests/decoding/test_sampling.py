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

from fastvlm.decoding import (
    Autoregressive,
    Engine,
    LayerSkip,
    PromptLookup,
    Request,
    Sampler,
    SelfSpeculative,
    Strategy,
    cycle,
    sampler,
)
from fastvlm.decoding.lookup import Lookup
from fastvlm.decoding.processors import LogitBias, LogitsProcessor, OccurrencePenalties
from fastvlm.drafting import AdaptiveLength, ConfidenceLength, FixedLength
from fastvlm.functional import noise
from fastvlm.language import split_decoder
from tests.decoding.conftest import SMALL, decode, finish, imitation, inputs_of

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
    "occurrence penalties": [OccurrencePenalties(0.7, 0.5, len(PROMPT))],
    "a bias": [LogitBias({1: 0.8, 4: -1.5, 5: 0.3})],
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
    drafter: Strategy,
    processors: Sequence[LogitsProcessor],
    replies: int,
    levels: list[Tensor],
) -> float:
    """Return the largest surprise of any position."""
    counts: list[Counter[int]] = [Counter() for _ in range(LENGTH)]
    accepted = 0
    engine, inputs = Engine(split_decoder(model), max_slots=BATCH), inputs_of(model, PROMPT)
    for first in range(0, replies, BATCH):
        requests = [
            Request(inputs, drafter, LENGTH, Sampler(processors, seed, PROMPT))
            for seed in range(first, first + BATCH)
        ]
        finish(engine, requests)
        for request in requests:
            accepted += sum(request.accepted)
            code = 0
            for position, token in enumerate(request.output_token_ids):
                code = code * VOCABULARY + token
                counts[position][code] += 1
    assert accepted > replies // 10, "hardly anything was drafted, so hardly anything was tested"
    return max(surprise(count, level, replies) for count, level in zip(counts, levels, strict=True))


def drafters(model: PreTrainedModel) -> dict[str, Strategy]:
    """Return a drafter with a distribution and one without."""
    return {
        "imitation": imitation(model, length=FixedLength(3)),
        "prompt-lookup": PromptLookup(FixedLength(3)),
        "cascade": imitation(model, length=ConfidenceLength(3, 0.2), lookup=Lookup()),
    }


@pytest.mark.parametrize("name", CASES)
def test_replies_have_the_targets_distribution(name: str) -> None:
    model = tiny_model()
    levels = expected(model, CASES[name])
    for drafter, strategy in drafters(model).items():
        # A cascade draws as its parts do: it is here for what it adds to them.
        if drafter != "cascade" or name in {"nothing", "several"}:
            assert worst(model, strategy, CASES[name], 2000, levels) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_replies_have_the_targets_distribution(name: str) -> None:
    """200,000 tokens a case."""
    model = tiny_model()
    levels = expected(model, CASES[name])
    for drafter in drafters(model).values():
        assert worst(model, drafter, CASES[name], 200_000 // LENGTH, levels) < 4


def accept_always(drafted: Sequence[int], chosen: Sequence[int]) -> tuple[int, int]:
    """A wrong rule."""
    return len(drafted), chosen[-1]


def same_everywhere(
    scores: Tensor,
    seeds: Sequence[int],
    positions: Sequence[int],
    tokens: Tensor | None = None,
    vocabulary_size: int | None = None,
) -> Tensor:
    """Wrong noise: it forgets where in the reply it is."""
    return noise.noisy_best(scores, seeds, [0] * len(positions), tokens, vocabulary_size)


def exponential(
    scores: Tensor,
    seeds: Sequence[int],
    positions: Sequence[int],
    tokens: Tensor | None = None,
    vocabulary_size: int | None = None,  # noqa: ARG001
) -> Tensor:
    """Wrong noise: of another distribution."""
    columns = torch.arange(scores.shape[-1]) if tokens is None else tokens
    drawn = -noise.gumbel(seeds, positions, columns, scores.dtype)
    return (scores + drawn.exp()).argmax(-1)


@pytest.mark.parametrize("bug", ["accepts always", "noise without a position", "other noise"])
@pytest.mark.parametrize("drafter", ["imitation", "prompt-lookup"])
def test_a_wrong_rule_is_found_out(bug: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would fail if acceptance or noise were wrong."""
    if bug == "accepts always":
        monkeypatch.setattr(cycle, "accept", accept_always)
    else:
        wrong = same_everywhere if bug == "noise without a position" else exponential
        monkeypatch.setattr(sampler, "noisy_best", wrong)
    model = tiny_model()
    levels = expected(model, [])
    assert worst(model, drafters(model)[drafter], [], 2000, levels) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.3, 4.0, 12.0])
@pytest.mark.parametrize("share", [1.0, 0.001, 0.0])
@pytest.mark.parametrize("size", [900, 50_000])
def test_the_best_tokens_are_those_of_all_noise(
    dtype: torch.dtype, spread: float, share: float, size: int
) -> None:
    chance = torch.Generator().manual_seed(3)
    tokens = torch.arange(size)
    for draw in range(30):
        # Positions of one reply, across what is computed at once, and another reply's.
        seeds, positions = [draw] * 4 + [draw + 1], [*range(7 * draw + 69, 7 * draw + 73), draw]
        scores = spread * torch.randn(5, size, generator=chance, dtype=dtype)
        scores[torch.rand(5, size, generator=chance) >= share] = -torch.inf
        whole = scores + noise.gumbel(seeds, positions, tokens, dtype)
        best = noise.noisy_best(scores, seeds, positions)
        assert torch.equal(best, whole.argmax(-1))
        some = torch.randperm(size, generator=chance)[:300]
        of_some = noise.noisy_best(scores[:, some], seeds, positions, some, size)
        assert torch.equal(of_some, whole[:, some].argmax(-1))


def test_noise_has_its_distribution_and_no_memory() -> None:
    tokens = torch.arange(400)
    by_seed = noise.gumbel(range(1000), [0] * 1000, tokens, torch.float64)
    by_position = noise.gumbel([7] * 1000, range(1000), tokens, torch.float64)
    quantiles = torch.arange(1, 20, dtype=torch.float64) / 20
    for found in (by_seed, by_position):
        expected = -torch.log(-torch.log(quantiles))
        assert (found.quantile(quantiles, 0).mean(1) - expected).abs().max() < 0.03
        for across in (found, found.T):
            correlations = torch.corrcoef(across) - torch.eye(len(across))
            # 400,000 or more correlations of independent rows stay within five deviations.
            assert correlations.abs().max() < 5.5 * across.shape[1] ** -0.5
    part = noise.gumbel([3], [9], tokens[100:130], torch.float64)
    assert torch.equal(part, noise.gumbel([3], [9], tokens, torch.float64)[:, 100:130])
    short = noise.gumbel([3], [9], tokens, torch.float32)
    double = noise.gumbel([3], [9], tokens, torch.float64)
    torch.testing.assert_close(short.double(), double, rtol=1e-4, atol=1e-4)
    largest = 2**64 - 1
    assert not torch.equal(noise.gumbel([largest], [0], tokens, torch.float32), short)


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
        [request] = decode(model, drafter, [PROMPT], 30, sampler=Sampler(processors, None, PROMPT))
        assert request.output_token_ids == best


def restricted(model: PreTrainedModel) -> SelfSpeculative:
    """Return drafting with some of the vocabulary."""
    made = imitation(model, length=FixedLength(3))
    assert made.network is not None
    made.network.draft_vocabulary = torch.tensor([1, 4, 5])
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_one_reply_under_every_strategy_and_in_any_company(name: str) -> None:
    model = tiny_model()
    decoder = split_decoder(model)
    ways = [
        Autoregressive(),
        PromptLookup(FixedLength(3)),
        SelfSpeculative(decoder, 1, length=FixedLength(2)),
        LayerSkip(decoder, (1,), FixedLength(3)),
        imitation(model, length=FixedLength(4)),
        imitation(model, kind="mlp", length=ConfidenceLength(5, 0.3)),
        imitation(model, length=AdaptiveLength(6)),
        restricted(model),
    ]

    def replies(seeds: Sequence[int], drafting: Strategy, slots: int) -> list[list[int]]:
        requests = [
            Request(inputs_of(model, PROMPT), drafting, 14, Sampler(CASES[name], seed, PROMPT))
            for seed in seeds
        ]
        finish(Engine(decoder, max_slots=slots), requests)
        return [request.output_token_ids for request in requests]

    seeds = [0, 1, 2, 3, 4, 5, 2**63, 2**64 - 1]
    known = replies(seeds, ways[0], 1)
    assert len({*map(tuple, known)}) == len(seeds)
    for drafting in ways:
        assert replies(seeds, drafting, 1) == known
        assert replies(seeds[::-1], drafting, 3) == known[::-1]


def test_shared_noise_accepts_what_both_would_draw() -> None:
    """Acceptance is near the sum of min(p, q), which rejection sampling reaches."""
    torch.manual_seed(3)
    tokens, draws = torch.arange(50), 4000
    for spread, loss in ((0.3, 0.05), (1.0, 0.1)):
        p = torch.randn(50, dtype=torch.float64) * 1.5
        q = p + spread * torch.randn(50, dtype=torch.float64)
        drawn = noise.gumbel(range(draws), [4] * draws, tokens, torch.float64)
        agreed = ((p + drawn).argmax(1) == (q + drawn).argmax(1)).double().mean()
        overlap = torch.minimum(p.softmax(0), q.softmax(0)).sum()
        assert overlap - loss < agreed < overlap + 0.03
