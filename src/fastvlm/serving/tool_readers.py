"""Calls of tools, read out of a reply as its text comes."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function, with its arguments or the first of them.

    Args:
        name: The function.
        arguments: A JSON object as text, as far as it has come.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """What follows of the last call's arguments.

    Args:
        text: The text.
    """

    text: str


Part = str | Call | MoreArguments
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
    """Reads content and calls. What isn't a call of a known function stays content.

    Content is held back only where it may be part of a call, and what is read doesn't depend on how
    the text is split. Whitespace before and between calls, and at the end of a reply with calls, is
    left out. Nothing that was returned is taken back, whatever follows.

    Args:
        key: The name of the arguments in a call: `{"name": ..., key: {...}}`.
        names: The functions that may be called.
    """

    def __init__(self, key: str, names: Collection[str]) -> None:
        self.key, self.names = key, names
        self.broken = False
        """Whether a call was not written as the format has it."""
        self._pending = ""
        self._called = False

    def feed(self, text: str) -> list[Part]:
        """Return what has become certain with new text."""
        self._pending += text
        return joined(self._read(ended=False))

    def end(self) -> list[Part]:
        """Return what was held back, as no more text will come."""
        found = joined(self._read(ended=True))
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

    A call that begins with the name of a known function and then has its arguments is one from
    there on: they come as the model writes them, also where they are broken or cut off. Any other
    is read once its closing tag is there, and is a call only if it is valid.

    Args:
        key: See `CallReader`.
        names: See `CallReader`.
        opening: The tag before a call.
        closing: The tag behind it.
    """

    def __init__(self, key: str, names: Collection[str], opening: str, closing: str) -> None:
        super().__init__(key, names)
        self.opening, self.closing = opening, closing
        self._head = re.compile(
            rf'\{{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"{re.escape(key)}"\s*:\s*(?=\{{)'
        )
        self._arguments: ObjectEnd | None = None
        """Where the arguments end that are being read."""
        self._behind = False
        """Whether what comes is behind a call's arguments."""

    def _read(self, *, ended: bool) -> list[Part]:
        found: list[Part] = []
        going = True
        while going:
            if self._arguments is not None:
                going = self._read_arguments(self._arguments, found)
            elif self._behind:
                going = self._read_behind(ended=ended)
            else:
                going = self._read_content(found, ended=ended)
        return found

    def _read_content(self, found: list[Part], *, ended: bool) -> bool:
        """Take content, or a call as far as its arguments; return whether more can be read."""
        before, tag, after = self._pending.partition(self.opening)
        if not tag:
            self._take_content(found, ended=ended)
            return False
        body = after.lstrip()
        if body and body[0] != "{":
            # A text about the tag.
            found.append(before + self.opening)
            self._pending = after
            return True
        head = self._head.match(body)
        if head is not None and head[1] in self.names:
            found += [before.rstrip(), Call(head[1], "")]
            self._called, self._pending = True, body[head.end() :]
            self._arguments = ObjectEnd(self.closing[0])
            return True
        size = self._size(after)
        if size is None:
            content = before.rstrip()
            if ended:
                content = self._pending
            found.append(content)
            self._pending = self._pending[len(content) :]
            return False
        value, stop = decoded(body)
        call = self._call(value) if body[stop:].lstrip().startswith(self.closing) else None
        rest = after[size + len(self.closing) :]
        if call is None:
            found.append(self._pending[: len(self._pending) - len(rest)])
        else:
            found += [before.rstrip(), call]
            self._called = True
        self._pending = rest
        return True

    def _take_content(self, found: list[Part], *, ended: bool) -> None:
        """Take the pending content that can't be the beginning of a call."""
        if ended and self._called and self._pending.isspace():
            return
        kept = len(self._pending) if ended else self._certain()
        found.append(self._pending[:kept])
        self._pending = self._pending[kept:]

    def _read_arguments(self, end: ObjectEnd, found: list[Part]) -> bool:
        """Take what has come of a call's arguments; return whether that is all of them."""
        size = end.find(self._pending)
        found.append(MoreArguments(self._pending[:size]))
        self._pending = self._pending[size:]
        if not end.found:
            return False
        self._arguments, self._behind = None, True
        self.broken |= end.broken
        return True

    def _read_behind(self, *, ended: bool) -> bool:
        """Leave out a call's end, from its arguments on; return whether more can be read."""
        text = self._pending.lstrip()
        if text.startswith(","):
            # Other keys.
            size = self._size(text)
            if size is None and not ended:
                return False
            self._pending = text if size is None else text[size + len(self.closing) :]
        else:
            text = text.removeprefix("}")
            rest = text.lstrip()
            if rest.startswith(self.closing):
                self._pending = rest[len(self.closing) :]
            elif not self.closing.startswith(rest):
                self._pending, self.broken = text, True
            elif ended:
                # The reply was cut off in it.
                self._pending = ""
            else:
                return False
        self._behind = False
        return True

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


class ObjectEnd:
    """Finds the end of a JSON object as its text comes.

    Args:
        after: A character that ends it, too, outside of strings: the first of what may follow.
    """

    def __init__(self, after: str) -> None:
        self.after, self.found, self.broken = after, False, False
        self._depth = 0
        self._inside = self._escaped = False

    def find(self, text: str) -> int:
        """Return how many characters of a further text are the object's."""
        for place, one in enumerate(text):
            if self._inside:
                self._inside = self._escaped or one != '"'
                self._escaped = one == "\\" and not self._escaped
                continue
            self._inside = one == '"'
            self._depth += (one == "{") - (one == "}")
            if one == self.after or not self._depth:
                self.found, self.broken = True, one == self.after
                return place + (not self.broken)
        return len(text)


def joined(parts: Iterable[Part]) -> list[Part]:
    """Return parts as few as they can be: nothing empty, and a call with all that is known."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, MoreArguments):
            if isinstance(last, Call):
                found[-1] = Call(last.name, last.arguments + part.text)
            elif part.text:
                found.append(part)
        elif isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        elif part:
            found.append(part)
    return found


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
