"""What a builder makes is what `generate` takes, and what the decoder is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fastvlm.functional.lru import LruBytes
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.prompts import (
    FastViTHDPromptBuilder,
    ImageFeatureCache,
    PromptBuilder,
    prompt_builder,
    question,
)
from fastvlm_example.scenes import render, sample
from tests.families import END, FAMILIES, IMAGE, replies
from tests.models import IMAGE_SIZE, VISUAL_TOKENS
from tests.processors import PROCESSORS, asked, character_tokenizer, template
from tests.processors import sample_image as image

QUESTION = "What is it?"


def around_fastvithd() -> tuple[PreTrainedModel, PromptBuilder]:
    model, _ = FAMILIES["fast-vlm"]()
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template("<image>")
    return model, prompt_builder(model, tokenizer, split_decoder(model))


def with_processor(family: str) -> tuple[PreTrainedModel, PromptBuilder]:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, _ = FAMILIES[family]()
    return model, prompt_builder(model, PROCESSORS[family](), split_decoder(model))


def of_text(family: str) -> tuple[PreTrainedModel, PromptBuilder]:
    model, _ = FAMILIES[family]()
    return model, prompt_builder(model, character_tokenizer(), split_decoder(model))


def cache() -> ImageFeatureCache:
    return ImageFeatureCache(LruBytes(2**20))


def assert_same(found: Any, expected: Any) -> None:
    assert found.token_ids == expected.token_ids
    for name in ("embeddings", "position_ids", "encoder_states"):
        ours, other = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (other is None)
        if ours is not None:
            torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("family", PROCESSORS)
def test_inputs_of_generate(family: str) -> None:
    model, builder = with_processor(family)
    model.generation_config.eos_token_id = END
    messages = question(QUESTION, image(0))
    inputs = builder.inputs(messages)
    expected = replies(model, asked(PROCESSORS[family](), [QUESTION], [image(0)]), 9)
    assert replies(model, inputs, 9) == expected
    assert_same(builder.decoder_inputs(messages), capture_decoder_inputs(model, inputs)[0])


@pytest.mark.parametrize("options", [{}, {"image_size": 192}, {"tiles": 2}, {"fit": "crop"}])
def test_inputs_of_generate_around_fastvithd(options: Any) -> None:
    model, builder = around_fastvithd()
    show = {"type": "image", "image": image(0)}
    text = {"type": "text", "text": QUESTION}
    other = {"type": "image", "image": image(1)}
    messages = [{"role": "user", "content": [show, text, other, text]}]
    inputs = builder.inputs(messages, **options)
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].dtype == model.dtype
    [row] = capture_decoder_inputs(model, inputs)
    assert_same(builder.decoder_inputs(messages, **options), row)
    assert_same(builder.decoder_inputs(messages, cache(), **options), row)
    assert len(replies(model, inputs, 5)[0]) in range(1, 6)


@pytest.mark.parametrize(
    "make", [around_fastvithd, lambda: of_text("llama"), lambda: of_text("opt-350m")]
)
def test_inputs_without_an_image(make: Callable[[], tuple[PreTrainedModel, PromptBuilder]]) -> None:
    model, builder = make()
    messages = question(QUESTION, None)
    inputs = builder.inputs(messages)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    found = builder.decoder_inputs(messages)
    assert_same(found, capture_decoder_inputs(model, inputs)[0])
    assert found.keys == found.token_ids == inputs["input_ids"][0].tolist()
    assert len(replies(model, inputs, 5)[0]) in range(1, 6)


def test_tokens_before_an_image_is_read() -> None:
    _, builder = around_fastvithd()
    assert isinstance(builder, FastViTHDPromptBuilder)
    assert builder.image_size == IMAGE_SIZE
    messages = question(QUESTION, image(0))
    shown = builder.tokens(messages)
    assert shown.count(IMAGE) == VISUAL_TOKENS
    assert shown == builder.decoder_inputs(messages).token_ids
    assert builder.tokens(messages, [3]).count(IMAGE) == 3
    assert builder.tokens(question(QUESTION, None)).count(IMAGE) == 0


def state(model: nn.Module) -> dict[str, Any]:
    return {
        name: (type(part), part.training, sorted(vars(part)), sorted(part._modules))
        for name, part in model.named_modules()
    }


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model, _ = FAMILIES["fast-vlm"]()
    model.train(training)
    before, weights = state(model), {n: w.clone() for n, w in model.state_dict().items()}
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template("<image>")
    builder = prompt_builder(model, tokenizer, split_decoder(model))
    if not training:
        builder.decoder_inputs(question(QUESTION, image(0)), cache())
    assert state(model) == before
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("family", ["fast-vlm", *PROCESSORS])
def test_keys_tell_images_apart(family: str) -> None:
    model, builder = around_fastvithd() if family == "fast-vlm" else with_processor(family)
    kept = cache()
    one, other = (
        question(QUESTION, image(0)),
        question(QUESTION, render(sample(9), 64).crop((0, 0, 64, 32))),
    )
    found, again, another = (builder.decoder_inputs(asked, kept) for asked in (one, one, other))
    # Without a digest an image's states can't be told from another's.
    assert builder.decoder_inputs(one).keys is None
    if model.get_decoder().config.is_encoder_decoder:
        assert found.keys is None
        return
    assert found.keys == again.keys
    assert len(found.keys) == len(found.token_ids)
    assert found.token_ids == another.token_ids
    differ = [a != b for a, b in zip(found.keys, another.keys, strict=True)]
    assert differ == [token == IMAGE for token in found.token_ids]
    seen = [key for key, token in zip(found.keys, found.token_ids, strict=True) if token == IMAGE]
    assert len({*seen}) == len(seen) > 0
    text = [key for key, token in zip(found.keys, found.token_ids, strict=True) if token != IMAGE]
    assert text == [token for token in found.token_ids if token != IMAGE]


def test_two_images_the_other_way_round() -> None:
    _, builder = with_processor("llava")
    kept = cache()
    one, other = ({"type": "image", "image": image(number)} for number in (0, 1))
    found = [
        builder.decoder_inputs([{"role": "user", "content": shown}], kept).keys
        for shown in ([one, other], [other, one])
    ]
    assert found[0] != found[1]


def test_a_model_with_another_way_to_its_features_has_no_keys() -> None:
    model, builder = with_processor("llava")
    base = model.model
    messages = question(QUESTION, image(0))
    expected = builder.decoder_inputs(messages, cache())
    own = base.forward

    def forward(**named: Any) -> Any:
        # The class's method, so that nobody answers in its place.
        patched = vars(base).pop("get_image_features")
        try:
            return own(**named)
        finally:
            base.get_image_features = patched

    base.forward = forward
    found = builder.decoder_inputs(messages, cache())
    assert_same(found, expected)
    assert expected.keys is not None
    assert found.keys is None
    # A text has no image that could be another.
    assert builder.keys([3, 4], None) == [3, 4]


def test_images_without_a_place_have_no_keys() -> None:
    model, builder = with_processor("llava")
    assert builder.keys([3, IMAGE, 4], ["digest"]) == [3, ("digest", 0), 4]
    assert builder.keys([3, 5, 4], ["digest"]) is None
    assert builder.keys([3, IMAGE, 4], []) is None
    model.config.image_token_id = None
    assert builder.keys([3, IMAGE, 4], ["digest"]) is None


def test_a_text_beside_kept_images() -> None:
    _, builder = with_processor("qwen2.5-vl")
    found = builder.decoder_inputs(question(QUESTION, None), cache())
    assert found.keys == found.token_ids
    assert found.position_ids is None
