"""Every generating class of transformers decodes as its generate does, or is refused."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.families import check_family, check_form
from fastvlm.language.refused import REFUSED, RELATIVES
from tests.language.scan import COMMITTED, classes, rows, summary
from tests.language.tiny import small_config

EQUAL = 187
"""Classes of transformers 5.23 that decode as generate does, at least."""


@cache
def stored() -> list[dict[str, Any]]:
    """Return the committed scan's rows."""
    found: list[dict[str, Any]] = json.loads(COMMITTED.read_text())["families"]
    return found


def types(result: str) -> set[str]:
    """Return the model types of which the committed scan has a result."""
    return {one["model_type"] for one in stored() if one["result"] == result}


REFUSED_CLASSES = [
    (one["model_type"], one["class"]) for one in stored() if one["result"] == "refused"
]


def shell(model_type: str, class_name: str) -> PreTrainedModel:
    """Return a tiny model of a class without weights."""
    if not hasattr(transformers, class_name):
        pytest.skip(f"This release of transformers has no {class_name}.")
    with torch.device("meta"):
        made: PreTrainedModel = getattr(transformers, class_name)(
            small_config(model_type, class_name)
        )
    return made


@pytest.mark.slow
def test_no_class_decodes_to_other_tokens() -> None:
    found = summary(rows(classes()))["families"]
    wrong = [one for one in found if one["result"] == "wrong"]
    assert not wrong, wrong
    assert sum(one["result"] == "equal" for one in found) >= EQUAL
    refused = {one["model_type"] for one in found if one["result"] == "refused"}
    assert REFUSED.keys() & {one.model_type for one in classes()} <= refused


def test_the_committed_scan_is_of_every_class() -> None:
    assert not types("wrong")
    if json.loads(COMMITTED.read_text())["transformers"] == transformers.__version__:
        names = [(one["model_type"], one["class"]) for one in stored()]
        assert names == [(one.model_type, one.class_name) for one in classes()]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "class_name"), REFUSED_CLASSES)
def test_every_refusal_comes_from_the_configuration(model_type: str, class_name: str) -> None:
    with pytest.raises(InputError, match="own generate"):
        check_family(shell(model_type, class_name))


@pytest.mark.parametrize(
    ("model_type", "class_name"), [one for one in REFUSED_CLASSES if one[0] in REFUSED]
)
def test_a_type_is_refused_by_name_where_nothing_else_shows(
    model_type: str, class_name: str
) -> None:
    check_form(shell(model_type, class_name))
    with pytest.raises(InputError, match=f"can't split {model_type}: "):
        check_family(shell(model_type, class_name))


def test_what_is_refused_by_name_is_refused_in_the_scan() -> None:
    assert REFUSED.keys() <= types("refused")
    assert RELATIVES.keys() <= types("refused")
    assert set(RELATIVES.values()) <= types("equal")
