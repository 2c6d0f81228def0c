"""The formats of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""A turn of a dialogue, as `transformers`' chat templates take it: its `role`, and as `content` a
text, or a list of `{"type": "image", "image": path or Pillow image}` and `{"type": "text", "text":
...}`; of what is read here, a list always."""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """The tokens of a text, which a model is given as they are: without a chat template.

    Args:
        token_ids: The tokens.
    """

    token_ids: Sequence[int]


Prompt = str | Sequence[Message] | TokenPrompt
"""A question about an image, a dialogue with its own images, or tokens."""
