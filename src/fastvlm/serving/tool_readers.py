"""Calls of tools, read out of a reply as its text comes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function.

    Args:
        name: The function.
        arguments: Its arguments, a JSON object as text.
    """

    name: str
    arguments: str


Part = str | Call
"""What a reply is made of: content, and calls."""


class PlainReader:
    """Reads a reply without calls: all of it is content."""

    def feed(self, text: str) -> list[Part]:
        """Return the content that new text is."""
        return [text] if text else []

    def end(self) -> list[Part]:
        """Return what was held back: nothing."""
        return []


class CallReader(ABC):
    """Reads content and calls. What isn't a valid call of a known function stays content.

    Content is held back only where it may be part of a call, and what is read doesn't depend on how
    the text is split. Whitespace before and between calls, and at the end of a reply with calls, is
    left out.

    Args:
        key: The name of the arguments in a call: `{"name": ..., key: {...}}`.
        names: The functions that may be called.
    """

    def __init__(self, key: str, names: Collection[str]) -> None:
        self.key, self.names = key, names
        self._pending = ""
        self._called = False

    def feed(self, text: str) -> list[Part]:
        """Return what has become certain with new text."""
        self._pending += text
        return [part for part in self._read(ended=False) if part]

    def end(self) -> list[Part]:
        """Return what was held back, as no more text will come."""
        found = [part for part in self._read(ended=True) if part]
        # Only whitespace may be left, behind a call.
        self._pending = ""
        return found

    @abstractmethod
    def _read(self, *, ended: bool) -> list[Part]:
        """Take from the pending text what is certain."""

    def _call(self, value: Any) -> Call | None:
        """Return the call that a value read from JSON is; None if it is none."""
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self.names:
            return None
        arguments = value.get(self.key)
        if not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            # Half a character can be escaped in JSON, but not sent.
            text.encode()
        except (ValueError, RecursionError):
            return None
        return Call(name, text)


class TaggedReader(CallReader):
    """Reads calls between tags, which may stand anywhere in a reply.

    Args:
        key: See `CallReader`.
        names: See `CallReader`.
        opening: The tag before a call.
        closing: The tag behind it.
    """

    def __init__(self, key: str, names: Collection[str], opening: str, closing: str) -> None:
        super().__init__(key, names)
        self.opening, self.closing = opening, closing

    def _read(self, *, ended: bool) -> list[Part]:
        found: list[Part] = []
        while self.opening in self._pending:
            before, _, after = self._pending.partition(self.opening)
            body = after.lstrip()
            if body and body[0] != "{":
                # A text about the tag.
                found.append(before + self.opening)
                self._pending = after
                continue
            size = self._size(after)
            if size is None:
                if ended:
                    break
                content = before.rstrip()
                self._pending = self._pending[len(content) :]
                return [*found, content]
            value, stop = decoded(body)
            call = self._call(value) if body[stop:].lstrip().startswith(self.closing) else None
            rest = after[size + len(self.closing) :]
            if call is None:
                found.append(self._pending[: len(self._pending) - len(rest)])
            else:
                found += [before.rstrip(), call]
                self._called = True
            self._pending = rest
        if ended and self._called and self._pending.isspace():
            return found
        kept = len(self._pending) if ended else self._certain()
        content, self._pending = self._pending[:kept], self._pending[kept:]
        return [*found, content]

    def _size(self, text: str) -> int | None:
        """Return the length of a call in the text behind its opening tag; None if it goes on."""
        place = text.find(self.closing)
        while place >= 0 and in_string(text[:place]):
            place = text.find(self.closing, place + 1)
        return None if place < 0 else place

    def _certain(self) -> int:
        """Return the length of the pending content that can't be the beginning of a call."""
        text = self._pending
        for size in range(len(self.opening) - 1, 0, -1):
            if text.endswith(self.opening[:size]):
                text = text[:-size]
                break
        return len(text.rstrip())


class LeadingReader(CallReader):
    """Reads calls as plain JSON, which a reply begins with.

    Args:
        key: See `CallReader`.
        names: See `CallReader`.
        mark: What may stand before the calls, if the tokenizer shows it.
        listed: Whether the calls are a list; else an object each, with semicolons between them.
    """

    def __init__(
        self, key: str, names: Collection[str], mark: str = "", *, listed: bool = False
    ) -> None:
        super().__init__(key, names)
        self.mark, self.listed = mark, listed
        self._content = False
        """Whether no more calls can come."""

    def _read(self, *, ended: bool) -> list[Part]:
        found: list[Part] = []
        while not self._content:
            text = self._pending.lstrip()
            text = text.removeprefix(";" if self._called else self.mark).lstrip()
            if not ended and (not text or (self.mark.startswith(text) and not self._called)):
                return found
            if not text and self._called:
                return found
            if not text.startswith("[" if self.listed else "{"):
                break
            value, stop = decoded(text)
            if value is None and not ended:
                return found
            calls = [self._call(one) for one in (value if self.listed and value else [value])]
            if None in calls:
                break
            found += [call for call in calls if call is not None]
            self._called, self._pending = True, text[stop:]
        self._content = True
        content, self._pending = self._pending, ""
        return [*found, content]


def decoded(text: str) -> tuple[Any, int]:
    """Return the JSON value that a text begins with, and its length; None if there is none yet."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def in_string(text: str) -> bool:
    """Return whether JSON that begins like this is inside of a string."""
    inside = escaped = False
    for one in text:
        if escaped:
            escaped = False
        elif one == '"':
            inside = not inside
        elif one == "\\":
            escaped = inside
    return inside
