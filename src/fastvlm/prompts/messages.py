"""Dialogues: turns of texts and images, in the formats that clients use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.functional.errors import InputError, first_line, shortened
from fastvlm.functional.messages import Dialogue, Message, Prompt, TokenPrompt, tools_of
from fastvlm.vision.loading import ImageInput

TEXT_PART_TYPES = ("text", "input_text")
"""Types of text parts."""
IMAGE_PART_KEYS = {
    "image": ("image", "url", "path", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
"""Types of image parts, each with the keys that may hold the image."""


def question(prompt: str, image: ImageInput | None) -> list[Message]:
    """Return a question as a dialogue of one turn.

    Args:
        prompt: The text.
        image: An image or a list of several, which come before the text; None for none.
    """
    images = [image] if not isinstance(image, list | tuple) else image
    return [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": one} for one in images if one is not None),
                {"type": "text", "text": prompt},
            ],
        }
    ]


def messages_of(prompt: Prompt, image: ImageInput | None) -> Sequence[Message] | TokenPrompt:
    """Return a prompt and its image as a dialogue, or a prompt of tokens as it is.

    Raises:
        InputError: An image is given beside a dialogue, which has its images in its messages, or
            beside tokens.
    """
    if isinstance(prompt, str):
        return question(prompt, image)
    if image is not None:
        raise InputError(
            "A prompt of tokens has no image; ask about one by a text or a dialogue."
            if isinstance(prompt, TokenPrompt)
            else "A dialogue's images stand in its messages; leave out the image."
        )
    return prompt


def checked_tokens(prompt: TokenPrompt, vocabulary_size: int, image_token: int | None) -> list[int]:
    """Return a prompt's tokens.

    Args:
        prompt: The prompt.
        vocabulary_size: The number of tokens that the model knows.
        image_token: The placeholder of visual tokens; None for a model of text alone.

    Raises:
        InputError: There is none, one is not the model's, or one is the image's placeholder.
    """
    token_ids = [*prompt.token_ids]
    if not token_ids:
        raise InputError("A prompt has at least one token; got none.")
    wrong = [one for one in token_ids if not 0 <= one < vocabulary_size]
    if wrong:
        raise InputError(f"The model's tokens are 0 to {vocabulary_size - 1}; got {wrong[0]}.")
    if image_token in token_ids:
        raise InputError("The prompt must not contain the image's placeholder itself.")
    return token_ids


def dialogue(messages: Any) -> Dialogue:
    """Return a dialogue in one format, whichever of the supported ones it came in.

    Args:
        messages: Turns as `transformers`' chat templates or OpenAI's API take them: each a `role`
            and a `content`, which is a text or a list of parts; with functions, a `Dialogue`.

    Returns:
        The dialogue with its functions, its turns each with a list of `{"type": "text", "text":
        ...}` and `{"type": "image", "image": ...}`.

    Raises:
        InputError: There is no turn, or something in one has no supported format.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            "A prompt is a text, or a list of messages as {'role': 'user', 'content': ...}; got"
            f" {shortened(repr(messages))}."
        )
    if not messages:
        raise InputError("A dialogue has at least one turn; got none.")
    return Dialogue([_turn(message) for message in messages], tools_of(messages))


def _turn(message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(
            f"A message is {{'role': 'user', 'content': ...}}; got {shortened(repr(message))}."
        )
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if content is None:
        content = []
    if isinstance(content, Mapping | bytes) or not isinstance(content, Sequence):
        raise InputError(
            f"A message's content is a text or a list of parts; got {shortened(repr(content))}."
        )
    check_text(message["role"])
    return {**message, "content": [_part(part) for part in content]}


def _part(part: Any) -> Mapping[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT_PART_TYPES and isinstance(part.get("text"), str):
        check_text(part["text"])
        return {"type": "text", "text": part["text"]}
    if isinstance(kind, str):
        for key in IMAGE_PART_KEYS.get(kind, ()):
            if (value := part.get(key)) is not None:
                nested = isinstance(value, Mapping) and key == "image_url"
                return {"type": "image", "image": value.get("url") if nested else value}
    raise InputError(
        "A part of a message is {'type': 'text', 'text': ...} or {'type': 'image', 'image': ...};"
        f" got {shortened(repr(part))}."
    )


def check_text(text: str) -> None:
    """Refuse a text that can't be encoded in UTF-8.

    Raises:
        InputError: It has a lone surrogate, as a terminal with another encoding produces.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text {shortened(repr(text))} is not valid Unicode at character {error.start}."
        ) from error


def images_of(messages: Sequence[Message]) -> list[ImageInput]:
    """Return the images of a dialogue in `dialogue`'s format, in order."""
    return [
        part["image"]
        for message in messages
        for part in message["content"]
        if part["type"] == "image"
    ]


def templated(
    processor: PreTrainedTokenizerBase | ProcessorMixin, name: str, turns: Sequence[Message]
) -> str:
    """Return a dialogue rendered by a chat template, up to where the reply begins.

    Args:
        processor: The processor or tokenizer with the template.
        name: The model's name, for error messages.
        turns: The dialogue, in the template's format.

    Raises:
        InputError: The template refuses it, is broken, or leaves out the functions.
    """

    def written(**shown: Any) -> str:
        try:
            # Their types know dictionaries alone, where any mapping will do.
            found: Any = processor.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True, **shown
            )
        except Exception as error:  # a template's own errors are of any kind
            raise InputError(
                f"The chat template of {name} refuses the dialogue: {first_line(error)}."
            ) from error
        return str(found)

    tools = [dict(one) for one in tools_of(turns)]
    if not tools:
        return written()
    found, without = written(tools=tools), None
    # A template of models that always have tools may need them.
    with suppress(InputError):
        without = written()
    if found == without:
        raise InputError(f"The chat template of {name} shows no tools, so it can't call any.")
    return found
