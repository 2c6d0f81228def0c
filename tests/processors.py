"""Processors for the small models of `tests.families`, of the classes that the families have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InstructBlipProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
)

from fastvlm.checkpoints.processors import StillImages
from fastvlm_example.scenes import render, sample
from tests.families import END, FAMILIES, IMAGE, PAD, PATCHES, QUERIES, START, Inputs

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role[0] }}:"
    "{% for part in turn.content %}"
    "{% if part.type == 'image' %}SHOWN{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
"""As checkpoints have them: of a turn whose content is a text it would show nothing."""
TEXT_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role[0] + ':' + turn.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:?!'\n"
SPECIAL = {
    93: "<|vision_end|>",
    94: "<|vision_start|>",
    80: "<fake_token_around_image>",
    81: "<end_of_utterance>",
    82: "<global-img>",
    83: "<row_1_col_1>",
    84: "<row_1_col_2>",
    85: "<row_2_col_1>",
}


def character_tokenizer(
    image: str = "<image>", video: str = "<video>", size: int = IMAGE + 1
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each character, in the models' small vocabulary."""
    named = {PAD: "<pad>", END: "</s>", START: "<s>", 95: video, IMAGE: image, **SPECIAL}
    named = {number: name for number, name in named.items() if number < size}
    rest = iter(CHARACTERS)
    vocabulary = {named.get(n) or next(rest, None) or f"<unused{n}>": n for n in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", START)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<pad>",
        additional_special_tokens=[n for i, n in named.items() if i > START],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def template(image: str) -> str:
    return TEMPLATE.replace("SHOWN", image)


def still(kind: type[ProcessorMixin], *parts: Any, **options: Any) -> ProcessorMixin:
    """Return a processor of a class with a video processor, which would need torchvision."""
    return type(kind.__name__, (StillImages, kind), {})(*parts, video_processor=None, **options)


def llava() -> ProcessorMixin:
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        character_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


PINPOINTS = [[32, 64], [64, 32]]


def llava_next() -> ProcessorMixin:
    return LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=PINPOINTS,
        ),
        character_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


def llava_onevision() -> ProcessorMixin:
    return still(
        LlavaOnevisionProcessor,
        LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        character_tokenizer(),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


def qwen(kind: type[ProcessorMixin]) -> ProcessorMixin:
    return still(
        kind,
        Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=2048),
        character_tokenizer("<|image_pad|>", "<|video_pad|>"),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


TILED = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def idefics3() -> ProcessorMixin:
    return Idefics3Processor(
        Idefics3ImageProcessor(**TILED),
        character_tokenizer(),
        image_seq_len=PATCHES // 4,
        chat_template=template("<image>"),
    )


def smolvlm() -> ProcessorMixin:
    return still(
        SmolVLMProcessor,
        SmolVLMImageProcessor(**TILED),
        character_tokenizer(),
        image_seq_len=PATCHES // 4,
        chat_template=template("<image>"),
    )


def blip2() -> ProcessorMixin:
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    return Blip2Processor(images, character_tokenizer(), num_query_tokens=QUERIES)


def instructblip() -> ProcessorMixin:
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    reader = character_tokenizer(size=20)
    return InstructBlipProcessor(images, character_tokenizer(), reader, num_query_tokens=QUERIES)


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "qwen2-vl": lambda: qwen(Qwen2VLProcessor),
    "qwen2.5-vl": lambda: qwen(Qwen2_5_VLProcessor),
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "blip2-opt": blip2,
    "blip2-t5": blip2,
    "instructblip-opt": instructblip,
    "instructblip-t5": instructblip,
    "instructblip-vicuna": instructblip,
}


def saved(family: str, folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Save a family's small model and its processor; return both."""
    model, _ = FAMILIES[family]()
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    processor = PROCESSORS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def sample_image(number: int) -> Image.Image:
    """Return an image; they are of different shapes."""
    width, height = ((64, 32), (32, 64), (60, 25), (48, 48))[number % 4]
    return render(sample(number), 64).crop((0, 0, width, height))


def asked(
    processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Image.Image]
) -> Inputs:
    """Return what transformers makes of questions with an image each, as a user writes it."""
    shown: Any = list(images)
    texts = list(prompts)
    if processor.chat_template:
        shown = [[one] for one in images]
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    options = {"add_special_tokens": not processor.chat_template}
    inputs = processor(images=shown, text=texts, padding=True, return_tensors="pt", **options)
    return dict(inputs.to(torch.float64))
