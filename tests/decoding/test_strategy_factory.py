"""The strategy that a model makes: which rule ends its drafts, and what outlives a request."""

from __future__ import annotations

from typing import Any

import pytest

from fastvlm.decoding import LayerSkip, SelfSpeculative
from fastvlm.decoding.strategy_factory import MAX_DRAFT_TOKENS
from fastvlm.drafting import AdaptiveLength, ConfidenceLength, FixedLength, ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel
from tests.decoding.conftest import imitation
from tests.models import small_vlm


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


def network(vlm: VisionLanguageModel, **recorded: Any) -> ImitationNetwork:
    made = imitation(vlm.model).network
    assert made is not None
    made.config.update(recorded)
    return made


def rule(vlm: VisionLanguageModel, *args: Any, **options: Any) -> Any:
    strategy = vlm.strategy(*args, **options)
    assert isinstance(strategy, SelfSpeculative | LayerSkip)
    return strategy.length


def test_a_draft_that_records_nothing_adapts(vlm: VisionLanguageModel) -> None:
    silent = network(vlm)
    adaptive = rule(vlm, "imitation", network=silent)
    assert isinstance(adaptive, AdaptiveLength)
    assert adaptive.maximum == MAX_DRAFT_TOKENS
    assert rule(vlm, "imitation", network=silent, num_speculative_tokens=5).maximum == 5
    for strategy in ("early-exit", "layer-skip"):
        assert isinstance(rule(vlm, strategy), AdaptiveLength)


def test_what_a_draft_records_counts_and_what_is_asked_for_counts_more(
    vlm: VisionLanguageModel,
) -> None:
    sure = network(vlm, confidence=0.4, num_speculative_tokens=14)
    assert rule(vlm, "imitation", network=sure) == ConfidenceLength(14, 0.4)
    assert rule(vlm, "imitation", network=sure, confidence=0) == FixedLength(14)
    fixed = network(vlm, confidence=0.0, num_speculative_tokens=3)
    assert rule(vlm, "imitation", network=fixed) == FixedLength(3)
    assert rule(vlm, "early-exit", confidence=0.5) == ConfidenceLength(MAX_DRAFT_TOKENS, 0.5)
    assert rule(vlm, "layer-skip", confidence=0, num_speculative_tokens=4) == FixedLength(4)


def test_what_was_learnt_is_kept_for_the_next_request(vlm: VisionLanguageModel) -> None:
    one, other = network(vlm), network(vlm)
    assert rule(vlm, "imitation", network=one) is rule(vlm, "imitation", network=one)
    assert rule(vlm, "imitation", network=one) is not rule(vlm, "imitation", network=other)
    assert rule(vlm, "early-exit", exit_layer=1) is not rule(vlm, "early-exit", exit_layer=2)
    assert rule(vlm, "layer-skip", skipped_layers=[3, 1]) is rule(
        vlm, "layer-skip", skipped_layers=(1, 3)
    )
    assert rule(vlm, "layer-skip", skipped_layers=[1]) is not rule(
        vlm, "layer-skip", skipped_layers=[3]
    )


def test_replies_teach_the_rule(vlm: VisionLanguageModel) -> None:
    drafting = network(vlm)
    for limit, short in ((1, 1.0), (12, 0.5)):
        strategy = vlm.strategy("imitation", network=drafting)
        reply = vlm.generate("What is it?", max_new_tokens=limit, strategy=strategy)
        assert (len(reply.token_ids) <= 2) == (limit == 1)
        assert rule(vlm, "imitation", network=drafting).one_word.value == short


@pytest.mark.parametrize(
    "options", [{"num_speculative_tokens": 0}, {"confidence": 1.5}, {"confidence": -0.1}]
)
def test_options_out_of_range_are_refused(vlm: VisionLanguageModel, options: dict) -> None:
    for strategy in ("early-exit", "layer-skip"):
        with pytest.raises(InputError):
            vlm.strategy(strategy, **options)


def test_layers_to_skip_are_searched_for(vlm: VisionLanguageModel) -> None:
    prompts = ["What is it?", "Describe the scene."]
    from fastvlm_example.scenes import render, sample

    images = [render(sample(seed), 192) for seed in range(2)]
    with pytest.raises(InputError, match="gone"):
        vlm.find_skipped_layers(["What is it?"], ["gone.png"])
    # A sample that fails is passed over.
    choice = vlm.find_skipped_layers(
        ["What is it?", *prompts], ["gone.png", *images], max_new_tokens=10
    )
    assert 1 <= len(choice.skipped) <= vlm.decoder.depth - 2
    assert 0 <= choice.acceptance <= 1
    strategy = vlm.strategy("layer-skip", skipped_layers=choice.skipped)
    for prompt, image in zip(prompts, images, strict=True):
        found = vlm.generate(prompt, image, max_new_tokens=12, strategy=strategy)
        assert found.token_ids == vlm.generate(prompt, image, max_new_tokens=12).token_ids
