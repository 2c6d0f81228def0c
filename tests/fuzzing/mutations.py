"""Changes to files and to JSON, as hypothesis draws them, and how they are made."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

SCALE = 2**20
"""Places in a file are fractions of this, so that a change fits files of any length."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of bytes.

    Args:
        kind: What is done at the place.
        at: The place, in parts of `SCALE` of the content.
        shift: Bytes to move on from there.
        data: What is written.
    """

    kind: Literal["flip", "write", "insert", "cut", "drop", "repeat"]
    at: int
    shift: int
    data: bytes


def edits(most: int = 6) -> st.SearchStrategy[tuple[Edit, ...]]:
    """Draw changes of bytes, often none."""
    edit = st.builds(
        Edit,
        st.sampled_from(["flip", "write", "insert", "cut", "drop", "repeat"]),
        st.integers(0, SCALE),
        st.integers(0, 16),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(TELLING)),
    )
    return st.lists(edit, max_size=most).map(tuple)


TELLING = [
    b"\0",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\0" * 64,
    b"\xef\xbb\xbf",
    b"\r\n",
    b'"',
    b"{",
    b"[" * 2000,
    b"NaN",
    b"1e999",
    b"\xed\xa0\x80",
    b"99999999999999999999",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
]
"""Bytes that parsers of files stumble over."""


def edited(content: bytes, changes: Sequence[Edit]) -> bytes:
    """Return content with changes."""
    for change in changes:
        at = min(len(content), change.at * len(content) // SCALE + change.shift)
        before, after = content[:at], content[at:]
        size = len(change.data)
        if change.kind == "flip":
            flipped = bytes(a ^ (b or 1) for a, b in zip(after, change.data, strict=False))
            content = before + flipped + after[len(flipped) :]
        elif change.kind == "write":
            content = before + change.data + after[size:]
        elif change.kind == "insert":
            content = before + change.data + after
        elif change.kind == "cut":
            content = before
        elif change.kind == "drop":
            content = before + after[size * 8 :]
        else:
            content = before + after[: size * 8] + after
    return content


@dataclass(frozen=True, slots=True)
class JsonEdit:
    """A change of a JSON document.

    Args:
        kind: What is done to the value.
        which: The value's number among all, modulo their count.
        value: What takes its place, or its key's.
    """

    kind: Literal["replace", "delete", "rename", "wrap", "swap"]
    which: int
    value: Any


odd_numbers = st.one_of(
    st.integers(-4, 300),
    st.sampled_from([-1, 0, 2**31, 2**63, 10**30, -(10**18), 1e308, 1e-320, 0.5]),
    st.floats(),
)
odd_texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\0", "é", "\U0001d518", "../../etc/passwd", "cuda", "float8", "qwen2", "auto"]
    ),
)
odd_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)
    ),
    max_leaves=4,
)


def json_edits(most: int = 3) -> st.SearchStrategy[tuple[JsonEdit, ...]]:
    """Draw changes of a JSON document, often none."""
    edit = st.builds(
        JsonEdit,
        st.sampled_from(["replace", "replace", "delete", "rename", "wrap", "swap"]),
        st.integers(0, 4096),
        odd_values,
    )
    return st.lists(edit, max_size=most).map(tuple)


def edited_json(document: Any, changes: Sequence[JsonEdit]) -> Any:
    """Return a JSON document with changes."""
    holder = {"": copy.deepcopy(document)}
    for change in changes:
        places = list(_places(holder))
        if not places:
            break
        parent, key = places[change.which % len(places)]
        value = copy.deepcopy(change.value)
        if change.kind == "replace":
            parent[key] = value
        elif change.kind == "wrap":
            parent[key] = [parent[key]]
        elif change.kind == "delete" and parent is not holder:
            del parent[key]
        elif change.kind == "rename" and isinstance(parent, dict) and parent is not holder:
            parent[str(value)] = parent.pop(key)
        elif change.kind == "swap":
            other, at = places[(change.which * 7 + 1) % len(places)]
            other[at], parent[key] = copy.deepcopy(parent[key]), copy.deepcopy(other[at])
    return holder.get("")


def dumped(document: Any) -> bytes:
    """Return a document as a file, lone surrogates and numbers out of range included."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _places(parent: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    for key in keys:
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from _places(parent[key])
