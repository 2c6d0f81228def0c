"""Masks are those of a naive search, and what can't be compiled is refused at once."""

from __future__ import annotations

import itertools
import random
import re
import sys
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as processing

from fastvlm import InputError, VisionLanguageModel
from fastvlm.decoding import Request, Sampler, StructuredOutput
from fastvlm.decoding.grammar import Constraint
from tests.decoding.forms import FORMS
from tests.models import small_vlm

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(prefix_bytes=0)


def asked(vlm: VisionLanguageModel, form: StructuredOutput) -> Request:
    return vlm.request("What is it?", structured=form, max_new_tokens=30)


@pytest.mark.parametrize("pattern", ["a(b|c)?d", "(ab|a)(c|bcd)", "[ab]{2,3}d?", "(circle|ci) ?s"])
def test_masks_are_those_of_a_naive_search(pattern: str, vlm: VisionLanguageModel) -> None:
    whole = {
        "a(b|c)?d": {"ad", "abd", "acd"},
        "(ab|a)(c|bcd)": {"abc", "abbcd", "ac", "abcd"},
        "[ab]{2,3}d?": {
            "".join(parts) + end
            for size in (2, 3)
            for parts in itertools.product("ab", repeat=size)
            for end in ("", "d")
        },
        "(circle|ci) ?s": {"circles", "circle s", "cis", "ci s"},
    }[pattern]
    assert all(re.fullmatch(pattern, text) for text in whole)
    begun = {text[:end] for text in whole for end in range(len(text) + 1)}
    rule = vlm.builder.grammars.constraint(StructuredOutput("regex", pattern), vlm.end_tokens)
    assert rule is not None
    size = len(vlm.tokenizer)
    special = set(vlm.tokenizer.all_special_ids)
    texts = [vlm.tokenizer.decode([token]) for token in range(size)]
    chance = random.Random(pattern)
    known: list[list[int]] = [[]]
    for prefix in known:
        text = vlm.tokenizer.decode(prefix)
        expected = {
            token for token in range(size) if token not in special and text + texts[token] in begun
        }
        known += [[*prefix, token] for token in expected]
        if text in whole:
            expected |= vlm.end_tokens
        mask = rule.allowed(prefix, size)
        assert mask is not None
        found = set(mask.nonzero()[:, 0].tolist())
        if found != expected:
            # Where the text is certain, it is spelt as the tokenizer does.
            [only] = found
            assert found < expected
            certain = text + texts[only]
            assert all(one.startswith(certain) for one in whole if one.startswith(text))
    # In any order: the matcher behind it goes back and forth.
    masks = {tuple(prefix): rule.allowed(prefix, size) for prefix in known}
    for prefix in chance.choices(known, k=200):
        again, before = rule.allowed(prefix, size), masks[tuple(prefix)]
        assert again is not None
        assert before is not None
        assert torch.equal(again, before)


@pytest.mark.parametrize("name", ["object", "reference", "grammar", "long string", "choice"])
def test_masks_depend_on_the_prefix_alone(name: str, vlm: VisionLanguageModel) -> None:
    """However the matcher came there: straight, or back from what was rejected."""
    size, chance = len(vlm.tokenizer), random.Random(name)

    def fresh() -> Constraint:
        made = vlm.builder.grammars.constraint(FORMS[name], vlm.end_tokens)
        assert made is not None
        return made

    wandering = fresh()
    known: list[list[int]] = [[]]
    for _ in range(150):
        prefix = chance.choice(known[-6:])
        mask, expected = wandering.allowed(prefix, size), fresh().allowed(prefix, size)
        assert mask is not None
        assert expected is not None
        assert torch.equal(mask, expected)
        going = [token for token in mask.nonzero()[:, 0].tolist() if token not in vlm.end_tokens]
        if going:
            known.append([*prefix, chance.choice(going)])
        # What is rejected leaves nothing behind.
        wandering.allowed([*prefix, chance.randrange(size), chance.randrange(size)], size)


def test_a_mask_fits_any_number_of_logits(vlm: VisionLanguageModel) -> None:
    rule = vlm.builder.grammars.constraint(FORMS["boolean"], vlm.end_tokens)
    assert rule is not None
    size = len(vlm.tokenizer)
    exact, wide, narrow = (rule.allowed([], width) for width in (size, size + 70, size - 70))
    assert exact is not None
    assert wide is not None
    assert narrow is not None
    assert torch.equal(wide[:size], exact)
    assert not wide[size:].any()
    assert torch.equal(narrow, exact[:-70])


def test_what_ends_or_breaks_a_reply_has_no_mask(vlm: VisionLanguageModel) -> None:
    rule = vlm.builder.grammars.constraint(FORMS["boolean"], vlm.end_tokens)
    assert rule is not None
    end, size = next(iter(vlm.end_tokens)), len(vlm.tokenizer)
    true = vlm.tokenizer.encode("true", add_special_tokens=False)
    assert rule.allowed([*true, end], size) is None
    assert rule.allowed([true[-1], true[-1]], size) is None
    found = rule.allowed(true, size)
    assert found is not None
    assert found.nonzero()[:, 0].tolist() == [end]
    rows = rule.masks(true, [end, 5, 6], size)
    assert rows.sum(1).tolist() == [1, size, size, size]
    with pytest.raises(InputError, match="form"):
        rule.masks([end], [], size)


def test_the_form_prevails_where_processors_leave_nothing(vlm: VisionLanguageModel) -> None:
    size = len(vlm.tokenizer)
    rule = vlm.builder.grammars.constraint(StructuredOutput("choice", ["yes"]), vlm.end_tokens)
    allowed = rule.allowed([], size) if rule is not None else None
    assert allowed is not None
    forbidden = processing.SuppressTokensLogitsProcessor(allowed.nonzero()[:, 0].tolist())
    logits = torch.randn(1, size)
    [token] = Sampler([forbidden], None, (), rule).sample([], [], logits)
    assert allowed[token]
    forced = processing.ForcedEOSTokenLogitsProcessor(1, next(iter(vlm.end_tokens)))
    [token] = Sampler([forced], None, (), rule).sample([], [], logits)
    assert allowed[token]


REFUSED: dict[str, tuple[str, Any]] = {
    "no number": ("json", {"type": "integer", "minimum": 5, "maximum": 1}),
    "no schema": ("json", {"type": "strange"}),
    "false": ("json", False),
    "unknown keyword": ("json", {"type": "array", "uniqueItems": True}),
    "unknown reference": ("json", {"$ref": "#/nowhere"}),
    "remote reference": ("json", {"$ref": "http://127.0.0.1:1/schema.json"}),
    "file reference": ("json", {"$ref": "file:///etc/hostname"}),
    "empty enumeration": ("json", {"type": "array", "items": {"enum": []}, "minItems": 1}),
    "a chain without end": ("json", {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    "endless reference": ("json", {"$ref": "#"}),
    "not an object": ("json", "[1, 2]"),
    "not JSON": ("json", "{"),
    "not serialisable": ("json", {"const": {1, 2}}),
    "infinite": ("json", {"const": float("inf")}),
    "half a character": ("json", {"const": "\ud800"}),
    "lenient": ("json", {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}),
    "broken regex": ("regex", "(a"),
    "lookahead": ("regex", "(?=a)a"),
    "nothing matches": ("regex", r"[^\x00-\U0010FFFF]"),
    "no rule": ("grammar", "start: nothing"),
    "left alone": ("grammar", "start: start"),
    "no grammar": ("grammar", "{{{"),
    "no choice": ("choice", []),
    "one text": ("choice", "yes"),
    "an empty choice": ("choice", ["a", ""]),
    "numbers": ("choice", [1, 2]),
    "empty": ("regex", ""),
    "a value": ("json_object", {}),
    "a kind": ("xml", "<a/>"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_at_once(name: str, vlm: VisionLanguageModel) -> None:
    kind, value = REFUSED[name]
    before = asked(vlm, FORMS["object"])
    vlm.engine.add(before)
    vlm.engine.step()
    started = time.perf_counter()
    with pytest.raises(InputError) as error:
        asked(vlm, StructuredOutput(kind, value))  # type: ignore[arg-type]
    assert time.perf_counter() - started < 2, "a machine that is busy has twice the time"
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    while not before.finished:
        vlm.engine.step()
    assert before.finish_reason in ("stop", "length")


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){1000}", "(a|b)*c(a|b){300}"])
def test_what_is_large_keeps_nobody_waiting(pattern: str, vlm: VisionLanguageModel) -> None:
    started = time.perf_counter()
    with suppress(InputError):
        vlm.builder.grammars.constraint(StructuredOutput("regex", pattern), vlm.end_tokens)
    assert time.perf_counter() - started < 2


def test_anything_else_is_no_form(vlm: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="StructuredOutput"):
        vlm.request("What is it?", structured={"type": "string"})


def test_without_the_library_it_says_what_to_install(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'fastvlm\[structured\]'"):
        asked(vlm, StructuredOutput("regex", "never compiled"))


def test_equal_forms_are_compiled_once(vlm: VisionLanguageModel) -> None:
    one, other = (StructuredOutput("json", {"const": "once"}) for _ in range(2))
    assert {one, other} == {StructuredOutput("json", '{"const": "once"}')}
    first, second = (vlm.builder.grammars.constraint(form, vlm.end_tokens) for form in (one, other))
    assert first is not None
    assert second is not None
    assert first is not second
    assert first._grammar is second._grammar


def test_a_model_without_an_end_is_refused(vlm: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="ends it"):
        vlm.builder.grammars.constraint(FORMS["boolean"], ())


def test_forced_tokens_are_those_without_an_alternative(vlm: VisionLanguageModel) -> None:
    size, end = len(vlm.tokenizer), next(iter(vlm.end_tokens))
    rule = vlm.builder.grammars.constraint(StructuredOutput("regex", "circle[a-z]? square"), {end})
    assert rule is not None
    # As "e" and "e " may both be tokens, what is certain may end before the text that is.
    begun = rule.forced([], 20, size)
    assert "circle".startswith(vlm.tokenizer.decode(begun))
    assert rule.forced([], 1, size) == begun[:1]
    assert begun
    rest = rule.forced(vlm.tokenizer.encode("circlex", add_special_tokens=False), 20, size)
    assert vlm.tokenizer.decode(rest[:-1]) == " square"
    assert rest[-1] == end
    assert rule.forced([end], 20, size) == []
