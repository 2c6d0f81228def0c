"""What the bodies of requests have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """A part of a request, without fields that it doesn't have."""

    model_config = ConfigDict(extra="forbid")


class Body(Strict):
    """The body of a request, in which null stands for a field that isn't given."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}
