"""Each family with its own processor: the tokens are those of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Kosmos2_5ImageProcessor

import fastvlm
from fastvlm.functional.errors import InputError
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
    several = 1 if family in NEWER else 4
    for question, shown, row in list(zip(QUESTIONS, images, expected, strict=True))[:several]:
        alone = replies(model, asked(processor, [question], [shown], model.dtype), 12)
        assert alone == [row]
    for name in STRATEGIES[1:3] if family in NEWER else STRATEGIES:
        strategy = vlm.strategy(name)
        together = vlm.generate_batch(QUESTIONS, images, strategy=strategy, max_new_tokens=12)
        assert [reply.token_ids for reply in together] == expected
        vlm.lru.clear()
        alone = vlm.generate(QUESTIONS[2], images[2], strategy=strategy, max_new_tokens=12)
        assert alone.token_ids == expected[2]


@pytest.fixture
def _few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kosmos-2.5's processor shows 4,096 patches of any image, which takes seconds."""
    own = Kosmos2_5ImageProcessor.preprocess

    def preprocess(*given: Any, **named: Any) -> Any:
        return own(*given, **{**named, "max_patches": 20})

    monkeypatch.setattr(Kosmos2_5ImageProcessor, "preprocess", preprocess)


@pytest.mark.usefixtures("_few_patches")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kosmos_answers_about_pages(strategy: str, tmp_path: Path) -> None:
    """Padding changes what its generate makes of a row: each is held against the row alone."""
    model, processor = saved("kosmos-2.5", tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=model.dtype)
    shown = [image(number) for number in (0, 1, 0, 3)]
    expected = [
        replies(model, asked(processor, [text], [page], model.dtype), 12)[0]
        for text, page in zip(QUESTIONS, shown, strict=True)
    ]
    assert len({*map(tuple, expected)}) == 4
    for text, page, row in zip(QUESTIONS, shown, expected, strict=True):
        found = vlm.generate(text, page, strategy=strategy, max_new_tokens=12)
        assert found.token_ids == row
    vlm.lru.clear()
    together = vlm.generate_batch(QUESTIONS, shown, strategy=strategy, max_new_tokens=12)
    assert [reply.token_ids for reply in together] == expected


@pytest.mark.usefixtures("_few_patches")
def test_kosmos_reads_one_page_at_the_beginning_of_one_turn(tmp_path: Path) -> None:
    """It has no form for dialogues, for several images or for none."""
    model, processor = saved("kosmos-2.5", tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=model.dtype)
    show, text = {"type": "image", "image": image(0)}, {"type": "text", "text": "What?"}
    first = {"role": "user", "content": [show, text]}
    with pytest.raises(InputError, match="a dialogue is one turn"):
        vlm.generate([first, {"role": "assistant", "content": "A."}, first], max_new_tokens=3)
    with pytest.raises(InputError, match="takes one image with each prompt; got 2"):
        vlm.generate([{"role": "user", "content": [show, show, text]}], max_new_tokens=3)
    expected = replies(model, asked(processor, ["What?"], [image(0)], model.dtype), 9)
    both = vlm.generate_batch(["What?", "What?"], [image(0), None], max_new_tokens=9)
    assert both[0].token_ids == expected[0]
    assert "takes one image with each prompt; got 0" in str(both[1].error)
