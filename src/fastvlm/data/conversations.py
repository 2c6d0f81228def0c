"""Training conversations, and the records that replace broken ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

from fastvlm.functional.errors import FastVlmError, InputError, first_line
from fastvlm.functional.messages import Message
from fastvlm.vision.loading import load_image


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation for training on its assistant turns, or a prompt for a model to answer.

    Args:
        name: The record's name, for error messages.
        messages: The turns: optionally a system's, then a user's and an assistant's in turn, the
            last of them an assistant's; of a prompt alone, the user's turn.
        alternatives: Further texts for the last turn, each as good as its own: an image's other
            captions.
    """

    name: str
    messages: tuple[Message, ...]
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that can't be used.

    Args:
        name: The record's name.
        reason: What is wrong with it.
    """

    name: str
    reason: str


Record = Conversation | Broken


class BrokenRecordError(FastVlmError):
    """A record can't be turned into a conversation; it is caught where records are read."""


@dataclass(frozen=True, slots=True)
class Records(Sequence[Record]):
    """Records with random access, each made when it is accessed.

    Args:
        rows: The rows, as published.
        convert: Makes a conversation of a name and a row, or raises `BrokenRecordError`.
        name: Returns a record's name, given its number and row.
    """

    rows: Sequence[Any]
    convert: Callable[[str, Any], Conversation]
    name: Callable[[int, Any], str]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.rows[index]
        return converted(self.name(index % len(self), row), row, self.convert)


class Shards(Protocol):
    """Records in shards that can only be read sequentially."""

    def __len__(self) -> int:
        """Return the number of shards."""
        ...

    def read(self, shard: int, start: int) -> Iterator[Record]:
        """Yield a shard's records from number `start` on."""
        ...


def converted(name: str, row: Any, convert: Callable[[str, Any], Conversation]) -> Record:
    """Return the conversation of a row, or a `Broken` record with the reason if there is none.

    Args:
        name: The record's name.
        row: The row, as published.
        convert: Makes a conversation of a name and a row.
    """
    try:
        return convert(name, row)
    except BrokenRecordError as error:
        return Broken(name, str(error))
    # What a row lacks, or holds in the place of something else, shows where it is used.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Broken(name, f"malformed record: {type(error).__name__}: {first_line(error)}")


def opened(conversation: Conversation) -> Record:
    """Return a conversation with every image opened, upright and in RGB, or a `Broken` record."""
    messages = []
    for message in conversation.messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                try:
                    part = {**part, "image": load_image(part["image"])}  # noqa: PLW2901
                # A Pillow image decodes here too, and raises what its format's decoder raises.
                except (InputError, OSError, SyntaxError, ValueError) as error:
                    return Broken(conversation.name, f"unreadable image: {first_line(error)}")
            parts.append(part)
        messages.append({**message, "content": parts})
    return replace(conversation, messages=tuple(messages))
