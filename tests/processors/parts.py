"""What the processors share: a tokenizer of characters, templates, images and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from fastvlm.checkpoints.processors import StillImages
from fastvlm_example.scenes import render, sample
from tests.families import END, IMAGE, PAD, START, Inputs

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
    image: str = "<image>",
    video: str = "<video>",
    size: int = IMAGE + 1,
    special: Mapping[int, str] = SPECIAL,
    **roles: str,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each character, in the models' small vocabulary.

    Args:
        image: The token of images.
        video: The token of videos.
        size: How many tokens there are.
        special: Other tokens that stand for something.
        roles: Names under which a processor asks for its tokens, such as `boi_token`.
    """
    named = {PAD: "<pad>", END: "</s>", START: "<s>", 95: video, IMAGE: image, **special}
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
        **roles,
    )


def template(image: str) -> str:
    return TEMPLATE.replace("SHOWN", image)


def still(kind: type[ProcessorMixin], *parts: Any, **options: Any) -> ProcessorMixin:
    """Return a processor of a class with a video processor, which would need torchvision."""
    return type(kind.__name__, (StillImages, kind), {})(*parts, video_processor=None, **options)


def sample_image(number: int) -> Image.Image:
    """Return an image; they are of different shapes."""
    width, height = ((64, 32), (32, 64), (60, 25), (48, 48))[number % 4]
    return render(sample(number), 64).crop((0, 0, width, height))


def asked(
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    dtype: torch.dtype = torch.float64,
    **options: Any,
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
    if processor.chat_template:
        options = {"add_special_tokens": False, **options}
    inputs = processor(images=shown, text=texts, padding=True, return_tensors="pt", **options)
    return dict(inputs.to(dtype))
