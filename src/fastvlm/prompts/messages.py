"""Dialogues: turns of texts and images."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm.data.conversations import Message
from fastvlm.functional.errors import InputError
from fastvlm.vision.loading import ImageInput


def question(prompt: str, image: ImageInput | None) -> list[Message]:
    """Return a question about an image as a dialogue of one turn."""
    return [
        {
            "role": "user",
            "content": [
                *([] if image is None else [{"type": "image", "image": image}]),
                {"type": "text", "text": prompt},
            ],
        }
    ]


def parts_of(message: Message) -> list[Mapping[str, Any]]:
    """Return the parts of a turn, each an image or a text.

    Raises:
        InputError: A part is neither a text nor an image.
    """
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    for part in content:
        kind = part.get("type")
        if not (kind == "image" and "image" in part) and kind != "text":
            raise InputError(
                "A part of a message is {'type': 'text', 'text': ...} or {'type': 'image',"
                f" 'image': ...}}; got {part!r}."
            )
    return list(content)


def images_of(messages: Sequence[Message]) -> list[ImageInput]:
    """Return the images of a dialogue, in their order.

    Raises:
        InputError: A part of a turn is neither a text nor an image.
    """
    return [
        part["image"]
        for message in messages
        for part in parts_of(message)
        if part["type"] == "image"
    ]
