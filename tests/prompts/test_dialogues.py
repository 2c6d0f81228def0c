"""Dialogues with every family: what is known is not computed again, and no token changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastvlm
from fastvlm.functional.errors import InputError
from fastvlm.language.structure import text_decoder
from fastvlm.vlm import VisionLanguageModel
from tests.families import FAMILIES, NEWER, replies
from tests.processors import NEWER_PROCESSORS, PROCESSORS, TEXT_TEMPLATE, character_tokenizer, saved
from tests.processors import sample_image as image

TALKING = [name for name in PROCESSORS if not name.startswith(("blip2", "instructblip"))]
QUICK = ("gemma3", "paligemma", "granite4-vision", "mllama", "qwen3-vl")
NEWER_TALKING = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in NEWER_PROCESSORS
    if name not in ("florence2", "kosmos-2.5")
]
SECOND = [*NEWER_TALKING, "florence2"]
SINGLE = ("paligemma2", "qwen3-vl-moe")
"""Families that aren't computed in float64."""
READ_FIRST = ("florence2", "mllama")
"""Newer families whose images are read before a decoder's first position."""


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Collect how many positions (or images) each call of a module computes."""
    calls: list[int] = []

    def seen(_: nn.Module, given: tuple, named: dict) -> None:
        x = given[0] if given else named["hidden_states"]
        calls.append(x.shape[1])

    hook = module.register_forward_pre_hook(seen, with_kwargs=True)
    yield calls
    hook.remove()


@contextmanager
def counted_features(vlm: VisionLanguageModel) -> Iterator[list[None]]:
    """Collect the calls of a vision tower."""
    base = vlm.model.base_model
    names = ("vision_tower", "visual", "vision_model")
    tower = next(getattr(base, name) for name in names if hasattr(base, name))
    calls: list[None] = []
    hook = tower.register_forward_pre_hook(lambda *_: calls.append(None))
    yield calls
    hook.remove()


def loaded(family: str, folder: Path, **options: Any) -> VisionLanguageModel:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    if not folder.exists():
        saved(family, folder)
    dtype = torch.float32 if family in SINGLE else torch.float64
    return fastvlm.load(folder, dtype=dtype, **options)


@pytest.mark.parametrize("family", [*TALKING, *NEWER_TALKING])
def test_ten_rounds_encode_an_image_once(family: str, tmp_path: Path) -> None:
    vlm = loaded(family, tmp_path / "model")
    fresh = loaded(family, tmp_path / "model", prefix_bytes=0)
    show = {"type": "image", "image": image(0)}
    messages: list[dict[str, Any]] = []
    before: list[int] = []
    with (
        counted_features(vlm) as encoded,
        counted(text_decoder(vlm.model).layers[-1]) as positions,
    ):
        for number in range(10):
            text = {"type": "text", "text": "It?"}
            messages.append({"role": "user", "content": [text] if number else [show, text]})
            positions.clear()
            found = vlm.generate(messages, max_new_tokens=2)
            assert found.token_ids == fresh.generate(messages, max_new_tokens=2).token_ids
            tokens = vlm.prompts.decoder_inputs(messages).token_ids
            shared = next(
                (n for n, pair in enumerate(zip(tokens, before, strict=False)) if len({*pair}) > 1),
                len(before),
            )
            # All of the earlier rounds but for what the tokenizer makes of a reply's text.
            assert shared >= len(before) - 3
            # A prompt that sees all of itself is another one with each turn.
            again = family.startswith("paligemma") or family in READ_FIRST
            assert positions[0] == len(tokens) - (0 if again else shared)
            before = tokens + found.token_ids[:-1]
            # A turn as a text is the same as a list of one text.
            messages.append({"role": "assistant", "content": found.text})
    # What is asked for without a cache above is kept nowhere.
    assert len(encoded) == (20 if family == "mllama" else 1 + 10)


@pytest.mark.parametrize("family", [*TALKING, *NEWER_TALKING])
def test_images_in_any_turn(family: str, tmp_path: Path) -> None:
    vlm = loaded(family, tmp_path / "model")
    one, other = ({"type": "image", "image": image(number)} for number in (1, 3))
    text = {"type": "text", "text": "What?"}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [one, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "A word."}]},
        {"role": "user", "content": [text, other, text]},
    ]
    inputs = vlm.prompts.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = replies(vlm.model, dict(inputs.to(vlm.model.dtype)), 9)
    for _ in range(2):
        with counted_features(vlm) as encoded:
            assert [vlm.generate(messages, max_new_tokens=9).token_ids] == expected
        # A turn as a text is the same as a list of one text.
        messages[1]["content"] = "A word."
    assert len(encoded) == int(family == "mllama")
    assert "get_image_features" not in vars(vlm.model.base_model)


@pytest.mark.parametrize("family", [*PROCESSORS, *SECOND])
def test_a_second_question_about_an_image(family: str, tmp_path: Path) -> None:
    vlm = loaded(family, tmp_path / "model")
    fresh = loaded(family, tmp_path / "model", prefix_bytes=0)
    calls = []
    for asked, shown in [("What?", 0), ("Who?", 0), ("Who?", 0), ("Who?", 1), ("Who?", 0)]:
        expected = fresh.generate(asked, image(shown), max_new_tokens=9)
        with counted_features(vlm) as encoded:
            found = vlm.generate(asked, image(shown), max_new_tokens=9)
        assert found.token_ids == expected.token_ids
        calls.append(len(encoded))
    # InstructBLIP's Q-Former reads the question: another one makes other features of an image.
    again = family.startswith("instructblip")
    assert calls == ([1] * 5 if family == "mllama" else [1, int(again), 0, 1, 0])
    # What an encoder reads is read anew.
    keys = vlm.request("Who?", image(0)).inputs.keys
    if family.endswith("t5") or family in READ_FIRST:
        assert keys is None
    else:
        assert vlm.builder.prefixes.match(keys).length == len(keys)
    assert fresh.lru.nbytes == 0


def test_features_are_kept_within_the_limit(tmp_path: Path) -> None:
    vlm = loaded("llava-next", tmp_path / "model", prefix_bytes=1000)
    for _ in range(2):
        with counted_features(vlm) as encoded:
            vlm.generate("What?", image(0), max_new_tokens=2)
        assert len(encoded) == 1
        assert vlm.lru.nbytes == 0


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    vlm = loaded("llava", tmp_path / "model")
    vlm.prompts.processor.patch_size = 4  # of a processor that is another model's
    with pytest.raises(InputError, match=r"refuses what its processor made .* do not match"):
        vlm.generate("What?", image(0))
    assert "get_image_features" not in vars(vlm.model.base_model)


@pytest.mark.parametrize("template", [None, TEXT_TEMPLATE])
@pytest.mark.parametrize("family", ["llama", "bart", "cohere2", "gpt-oss", "phi3", "t5gemma"])
def test_a_model_of_text_alone(family: str, template: str | None, tmp_path: Path) -> None:
    model, _ = {**FAMILIES, **NEWER}[family]()
    if family == "gpt-oss":
        # Its experts are loaded in another implementation, with which others' replies may differ.
        model.set_experts_implementation("grouped_mm")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=model.dtype)
    asked = ["What is it?", "How are you?"]
    expected = [
        replies(
            model,
            tokenizer(text, return_tensors="pt")
            if template is None
            else tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            ),
            9,
        )[0]
        for text in asked
    ]
    assert [vlm.generate(text, max_new_tokens=9).token_ids for text in asked] == expected
    together = vlm.generate_batch(asked, [None, None], max_new_tokens=9)
    assert [reply.token_ids for reply in together] == expected
    with pytest.raises(
        InputError, match=f"{type(model).__name__} reads text alone; leave out the image"
    ):
        vlm.generate("What?", image(0))
