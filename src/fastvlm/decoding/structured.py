"""What a reply is to look like: a JSON schema, any JSON object, a regex, a choice, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastvlm.functional.errors import InputError, first_line, shortened

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that a reply has, by the names that vLLM uses.

    | kind | value | the reply is |
    |---|---|---|
    | `json` | a JSON schema, as a dictionary or as text | JSON that the schema allows |
    | `json_object` | none | a JSON object |
    | `regex` | a regular expression, as Rust has them | text that it matches as a whole |
    | `choice` | strings | one of them |
    | `grammar` | a grammar in Lark's notation, with a rule `start` | text of the grammar |

    Between two tokens of JSON stands nothing, a space, or a line break and an indentation of up to
    16 spaces or 8 tabs. Equal forms are compiled once.

    Args:
        kind: The kind.
        value: What the kind needs; kept as text, a choice as a tuple.

    Raises:
        InputError: There is no such kind, or the value isn't what it needs.
    """

    kind: Kind
    value: Any = None

    def __post_init__(self) -> None:
        """Check the value, and keep it in a form that can be hashed."""
        if self.kind not in KINDS:
            raise InputError(
                f"structured is one of {', '.join(KINDS)}; got {shortened(self.kind)!r}."
            )
        object.__setattr__(self, "value", _hashable(self.kind, self.value))


def _hashable(kind: Kind, value: Any) -> str | tuple[str, ...] | None:
    """Return a value as text, or as a tuple of texts.

    Raises:
        InputError: It isn't what its kind needs.
    """
    if kind == "json_object":
        if value is not None:
            raise InputError(f"A json_object has no value; got {shortened(value)}.")
        return None
    if kind == "choice":
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not several or not value or any(not isinstance(one, str) or not one for one in value):
            raise InputError(
                "A choice is one or more strings of at least one character; got"
                f" {shortened(value)}."
            )
        return tuple(_encodable(one) for one in value)
    if kind == "json":
        return _schema_text(value)
    if not isinstance(value, str) or not value:
        raise InputError(f"A {kind} is text of at least one character; got {shortened(value)}.")
    return _encodable(value)


def _schema_text(value: Any) -> str:
    """Return a JSON schema as text, with its properties in their order."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping | bool):
            raise InputError(f"A JSON schema is an object; got {shortened(value)}.")
        return _encodable(json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The JSON schema is not JSON: {first_line(error)}.") from error


def _encodable(text: str) -> str:
    """Return a text, unless it has half a character.

    Raises:
        InputError: It can't be written in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"What a reply is to look like is written in UTF-8; got {shortened(text)}."
        ) from error
    return text
