"""Every generating class of transformers decodes as its generate does, or is refused."""

from __future__ import annotations

import json

import pytest
import transformers

from tests.language.scan import COMMITTED, classes, rows, summary

EQUAL = 187
"""Classes of transformers 5.23 that decode as generate does, at least."""


@pytest.mark.slow
def test_no_class_decodes_to_other_tokens() -> None:
    found = summary(rows(classes()))["families"]
    wrong = [one for one in found if one["result"] == "wrong"]
    assert not wrong, wrong
    assert sum(one["result"] == "equal" for one in found) >= EQUAL


def test_the_committed_scan_is_of_every_class() -> None:
    stored = json.loads(COMMITTED.read_text())
    assert not [one for one in stored["families"] if one["result"] == "wrong"]
    if stored["transformers"] == transformers.__version__:
        names = [(one["model_type"], one["class"]) for one in stored["families"]]
        assert names == [(one.model_type, one.class_name) for one in classes()]
