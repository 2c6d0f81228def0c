"""How a new model's turns are written: the formats that a decoder may know from its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastvlm.checkpoints.layouts import CHATML_TEMPLATE, IMAGE_TOKEN
from fastvlm.functional.errors import InputError

GEMMA_IMAGE_TOKEN = "<start_of_image>"
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set system = namespace(text='') %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set system.text = (message['content'] if message['content'] is string"
    " else message['content'] | map(attribute='text') | join('')) + '\n\n' %}"
    "{% else %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ system.text }}{% set system.text = '' %}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>\n"
    "{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma's conversation: the system's text begins the first turn, an image is a line of its own."""


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """A way to write turns and images.

    Args:
        name: What it is called.
        tokens: The tokens that a vocabulary must have for it.
        template: The chat template.
        end: The token that ends a turn.
        image: The token that stands for an image; it is added where a vocabulary lacks it.
    """

    name: str
    tokens: tuple[str, ...]
    template: str
    end: str
    image: str


TURN_FORMATS = (
    TurnFormat(
        "ChatML", ("<|im_start|>", "<|im_end|>"), CHATML_TEMPLATE, "<|im_end|>", IMAGE_TOKEN
    ),
    TurnFormat(
        "Gemma's",
        ("<start_of_turn>", "<end_of_turn>", GEMMA_IMAGE_TOKEN),
        GEMMA_TEMPLATE,
        "<end_of_turn>",
        GEMMA_IMAGE_TOKEN,
    ),
)
"""The formats, in the order in which they are tried."""


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, decoder: Path) -> tuple[str, int | None]:
    """Give a tokenizer a token for images, and a chat template with images if its own has none.

    Returns:
        The token for images, and the id of the token that ends a turn in the new template; None
        where the tokenizer's own template is kept.

    Raises:
        InputError: Its template doesn't support images, and its vocabulary has the tokens of no
            known format.
    """
    vocabulary = tokenizer.get_vocab()
    known = [form for form in TURN_FORMATS if all(token in vocabulary for token in form.tokens)]
    for image in {form.image: None for form in (*known, *TURN_FORMATS)}:
        if writes_images(tokenizer, image):
            add_image_token(tokenizer, image)
            return image, None
    if not known:
        names = " or ".join(form.name for form in TURN_FORMATS)
        raise InputError(
            f"The chat template of {decoder} has no place for images, and its tokenizer doesn't"
            f" know the tokens of {names} turns; set a tokenizer.chat_template that writes"
            f" {IMAGE_TOKEN}."
        )
    form = known[0]
    add_image_token(tokenizer, form.image)
    tokenizer.chat_template = form.template
    return form.image, vocabulary[form.end]


def writes_images(tokenizer: PreTrainedTokenizerBase, image: str) -> bool:
    """Return whether a tokenizer's own chat template writes a token for each image."""
    if not tokenizer.chat_template:
        return False
    shown: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    try:
        text = str(tokenizer.apply_chat_template(shown, tokenize=False))
    except Exception:  # noqa: BLE001 (a template may raise anything)
        return False
    return text.count(image) == 1 and "'type'" not in text


def add_image_token(tokenizer: PreTrainedTokenizerBase, image: str) -> None:
    """Add a token for images to a vocabulary that lacks it."""
    if image not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image]})
