"""Each family with its own processor: the tokens are those of `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastvlm
from tests.families import replies
from tests.processors import NEWER_PROCESSORS, PROCESSORS, asked, saved
from tests.processors import sample_image as image

QUESTIONS = ["What is it?", "Where is A?", "How many b?", "Say a word."]
STRATEGIES = ["autoregressive", "prompt-lookup", "early-exit", "layer-skip"]


NEWER = [name for name in NEWER_PROCESSORS if name != "kosmos-2.5"]


@pytest.mark.parametrize("family", [*PROCESSORS, *NEWER])
def test_the_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = saved(family, tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=model.dtype)
    images = [image(number) for number in range(4)]
    expected = replies(model, asked(processor, QUESTIONS, images, model.dtype), 12)
    assert len({*map(tuple, expected)}) == 4
    for question, shown, row in zip(QUESTIONS, images, expected, strict=True):
        alone = replies(model, asked(processor, [question], [shown], model.dtype), 12)
        assert alone == [row]
    for name in STRATEGIES:
        strategy = vlm.strategy(name)
        together = vlm.generate_batch(QUESTIONS, images, strategy=strategy, max_new_tokens=12)
        assert [reply.token_ids for reply in together] == expected
        vlm.lru.clear()
        alone = vlm.generate(QUESTIONS[2], images[2], strategy=strategy, max_new_tokens=12)
        assert alone.token_ids == expected[2]


@pytest.mark.slow
def test_kosmos_answers_about_a_page(tmp_path: Path) -> None:
    """Its processor shows 4,096 patches of any image, and takes one question at a time."""
    model, processor = saved("kosmos-2.5", tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=model.dtype)
    expected = replies(model, asked(processor, QUESTIONS[:1], [image(0)], model.dtype), 12)
    found = vlm.generate(QUESTIONS[0], image(0), strategy="early-exit", max_new_tokens=12)
    assert [found.token_ids] == expected
