"""The formats of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

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


@dataclass(frozen=True, slots=True)
class Dialogue(Sequence[Message]):
    """A dialogue with functions that the model may call; it goes wherever a list of turns does.

    Args:
        turns: The turns.
        tools: The functions, as `transformers`' chat templates take them: `{"type": "function",
            "function": {"name": ..., "description": ..., "parameters": a JSON schema}}`.
    """

    turns: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        """Return a turn, or several."""
        return self.turns[index]

    def __len__(self) -> int:
        """Return the number of turns."""
        return len(self.turns)


def tools_of(turns: Sequence[Message]) -> Sequence[Mapping[str, Any]]:
    """Return the functions that the model may call in a dialogue; none without any."""
    return turns.tools if isinstance(turns, Dialogue) else ()


Prompt = str | Sequence[Message] | TokenPrompt
"""A question about an image, a dialogue with its own images, or tokens."""
