"""Prompts with fields: what is put in, and what is refused."""

from __future__ import annotations

import pytest

from fastvlm.captioning.template import MissingFieldError, PromptTemplate
from fastvlm.functional.errors import InputError


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Describe it.", "Describe it."),
        ("What is {topic} in {name}?", "What is a cat in a.png?"),
        ('As {{"a": {number}}}', 'As {"a": 3}'),
        ("{topic}{topic}", "a cata cat"),
    ],
)
def test_fields_are_put_in(text: str, prompt: str) -> None:
    fields = {"topic": "a cat", "name": "a.png", "number": 3, "nothing": None}
    assert PromptTemplate(text).of(fields) == prompt


@pytest.mark.parametrize("text", ["", " ", "{", "a } b", "{}", "{0.__class__}", "{a[0]}", "{a!r}"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(InputError):
        PromptTemplate(text)


def test_a_row_without_the_field() -> None:
    template = PromptTemplate("{topic}")
    for fields in ({}, {"topic": None}):
        with pytest.raises(MissingFieldError, match="topic"):
            template.of(fields)
