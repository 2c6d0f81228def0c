"""Each family with its own processor: the tokens are those of `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastvlm
from tests.families import replies
from tests.processors import PROCESSORS, asked, saved
from tests.processors import sample_image as image

QUESTIONS = ["What is it?", "Where is A?", "How many b?", "Say a word."]
STRATEGIES = ["autoregressive", "prompt-lookup", "early-exit", "layer-skip"]


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = saved(family, tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=torch.float64)
    images = [image(number) for number in range(4)]
    expected = replies(model, asked(processor, QUESTIONS, images), 12)
    assert len({*map(tuple, expected)}) == 4
    for question, shown, row in zip(QUESTIONS, images, expected, strict=True):
        alone = replies(model, asked(processor, [question], [shown]), 12)
        assert alone == [row]
    for name in STRATEGIES:
        strategy = vlm.strategy(name)
        together = vlm.generate_batch(QUESTIONS, images, strategy=strategy, max_new_tokens=12)
        assert [reply.token_ids for reply in together] == expected
        vlm.lru.clear()
        alone = vlm.generate(QUESTIONS[2], images[2], strategy=strategy, max_new_tokens=12)
        assert alone.token_ids == expected[2]
