"""Prompts with the fields of an image's row in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from fastvlm.functional.errors import InputError


class MissingFieldError(InputError):
    """A row has no such field."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt in which `{field}` stands for a field of the image's row, and `{{` for a brace.

    Args:
        text: The prompt.

    Raises:
        InputError: It is empty, a brace is not closed, or stands around something else than a name.
    """

    text: str
    _parts: tuple[tuple[str, str | None], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Read the template."""
        if not self.text.strip():
            raise InputError("A prompt has at least one character.")
        try:
            found = list(Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(
                f"The prompt is not a template: {error}; a brace that is meant as one is doubled."
            ) from error
        for _, name, form, conversion in found:
            if name is not None and (
                not name.strip() or form or conversion or set(name) & set(".[")
            ):
                raise InputError(
                    f"In a prompt, {{name}} stands for a field of the image's row; got"
                    f" {{{name}}}. A brace that is meant as one is doubled."
                )
        object.__setattr__(self, "_parts", tuple((text, name) for text, name, *_ in found))

    def of(self, fields: Mapping[str, Any]) -> str:
        """Return the prompt for a row.

        Raises:
            MissingFieldError: The row lacks a field.
        """
        return "".join(
            text + ("" if name is None else self._value(name, fields)) for text, name in self._parts
        )

    @staticmethod
    def _value(name: str, fields: Mapping[str, Any]) -> str:
        value = fields.get(name)
        if value is None:
            known = ", ".join(sorted(fields)) or "none"
            raise MissingFieldError(f"The row has no field {name!r}; it has {known}.")
        return value if isinstance(value, str) else json.dumps(value, default=str)
