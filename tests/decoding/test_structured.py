"""Replies of a given form: valid, the same under every strategy, and nobody else's matter."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as processing

from fastvlm import InputError, VisionLanguageModel
from fastvlm.decoding import Request, Sampler, SelfSpeculative, Strategy, StructuredOutput
from fastvlm.decoding.grammar import Constraint
from fastvlm.drafting import ConfidenceLength, FixedLength
from tests.decoding.conftest import imitation
from tests.models import small_vlm

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
BOX = {
    "type": "object",
    "properties": {
        "label": {"enum": ["circle", "square", "triangle"]},
        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
        "sure": {"type": "boolean"},
    },
    "required": ["label", "box"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "string": {"type": "string", "maxLength": 12},
    "long string": {"type": "string"},
    "empty string": {"type": "string", "maxLength": 0},
    "integer": {"type": "integer", "minimum": -20, "maximum": 20},
    "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "above": {"type": "integer", "exclusiveMinimum": 99, "maximum": 1000},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["boolean", "null", "integer"]},
    "enum": {"enum": ["red", "green", 3, None, False]},
    "const": {"const": {"a": [1, "two"]}},
    "unicode": {"enum": ["für", "日本語", "\N{GRINNING FACE}"]},
    "unicode key": {"type": "object", "properties": {"größe": {"type": "boolean"}},
                    "required": ["größe"], "additionalProperties": False},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]{3}$"},
    "unanchored pattern": {"type": "string", "pattern": "[0-9]x", "maxLength": 10},
    "unicode pattern": {"type": "string", "pattern": "^[äöü]{3}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a", "b"]}],
              "items": False, "minItems": 2},
    "no array": {"type": "array", "maxItems": 0},
    "object": BOX,
    "optional": {**BOX, "required": []},
    "nested": {"type": "object", "properties": {"in": {"type": "object", "properties": {
        "deep": BOX}, "required": ["deep"], "additionalProperties": False}}, "required": ["in"],
        "additionalProperties": False},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 5, "maximum": 7}]},
    "one of": {"oneOf": [
        {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "boolean"}},
         "required": ["kind", "x"], "additionalProperties": False},
        {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"type": "null"}},
         "required": ["kind", "y"], "additionalProperties": False}]},
    "all of": {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 12}]},
    "reference": LIST,
    "values": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "boxes": {"type": "array", "items": BOX, "maxItems": 2},
    "anything": {},
}  # fmt: skip
OTHERS = {
    "json object": StructuredOutput("json_object"),
    "regex": StructuredOutput("regex", "(yes|no), [0-9]{2,4} [äß]+!"),
    "choice": StructuredOutput("choice", ["circle", "circles", "a.b*", "für \n", "<|end|>"]),
    "grammar": StructuredOutput(
        "grammar", 'start: sum\nsum: term | sum "+" term\nterm: /[0-9]{1,2}/ | "(" sum ")"'
    ),
}
FORMS = {**{name: StructuredOutput("json", one) for name, one in SCHEMAS.items()}, **OTHERS}
LIMIT = 60


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(prefix_bytes=0)


@pytest.fixture(scope="module")
def strategies(vlm: VisionLanguageModel) -> dict[str, Strategy]:
    restricted = imitation(vlm.model, length=FixedLength(4))
    assert restricted.network is not None
    restricted.network.draft_vocabulary = torch.arange(3, len(vlm.tokenizer), 3)
    return {
        "imitation": imitation(vlm.model, length=FixedLength(4)),
        "perfect": imitation(vlm.model, exit_layer=2, perfect=True, length=FixedLength(5)),
        "confidence": imitation(vlm.model, kind="mlp", length=ConfidenceLength(5, 0.2)),
        "restricted": restricted,
        "early exit": SelfSpeculative(vlm.decoder, 2, length=FixedLength(3)),
        "layer-skip": vlm.strategy("layer-skip"),
        "prompt-lookup": vlm.strategy("prompt-lookup"),
    }


def text_of(vlm: VisionLanguageModel, request: Request) -> str:
    *tokens, end = request.output_token_ids
    assert end in vlm.end_tokens
    return str(vlm.tokenizer.decode(tokens))


def check_form(form: StructuredOutput, text: str) -> None:
    if form.kind in ("json", "json_object"):
        schema = {"type": "object"} if form.kind == "json_object" else json.loads(form.value)
        checker = jsonschema.FormatChecker(["date", "uuid"])
        jsonschema.validate(json.loads(text), schema, format_checker=checker)
    elif form.kind == "regex":
        assert re.fullmatch(form.value, text)
    elif form.kind == "choice":
        assert text in form.value
    else:
        assert re.fullmatch(r"[0-9()+]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text)), int)


def decoded(vlm: VisionLanguageModel, requests: Sequence[Request]) -> list[Request]:
    for request in vlm.engine.run(requests):
        if request.error is not None:
            raise request.error
    return list(requests)


def asked(
    vlm: VisionLanguageModel,
    form: StructuredOutput | None,
    strategy: Strategy | str,
    **options: Any,
) -> Request:
    options = {"max_new_tokens": LIMIT, **options}
    return vlm.request("What is it?", strategy=strategy, structured=form, **options)


SAMPLED = {"temperature": 0.8, "top_k": 40, "seed": 5}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalised": {"repetition_penalty": 1.4},
}


@pytest.mark.parametrize("name", FORMS)
def test_replies_are_valid_and_the_same_under_every_strategy(
    name: str, vlm: VisionLanguageModel, strategies: dict[str, Strategy]
) -> None:
    form = FORMS[name]
    ways = [*WAYS.values(), *({**SAMPLED, "seed": seed} for seed in range(6, 9))]
    plain = decoded(vlm, [asked(vlm, form, "autoregressive", **way) for way in ways])
    for request in plain:
        if request.finish_reason == "stop":
            check_form(form, text_of(vlm, request))
        else:
            assert request.finish_reason == "length"
            assert len(request.output_token_ids) == LIMIT
    for strategy in strategies.values():
        together = decoded(vlm, [asked(vlm, form, strategy, **way) for way in ways])
        assert [one.output_token_ids for one in together] == [one.output_token_ids for one in plain]
        assert [one.finish_reason for one in together] == [one.finish_reason for one in plain]


def test_most_forms_come_to_an_end(vlm: VisionLanguageModel) -> None:
    """What the test above holds against the schemas is not nothing."""
    requests = [asked(vlm, form, "autoregressive", **SAMPLED) for form in FORMS.values()]
    ended = [one for one in decoded(vlm, requests) if one.finish_reason == "stop"]
    assert len(ended) > 0.7 * len(FORMS)


@pytest.mark.parametrize("way", WAYS)
def test_others_in_the_batch_change_nothing(
    way: str, vlm: VisionLanguageModel, strategies: dict[str, Strategy]
) -> None:
    forms = [FORMS["object"], None, FORMS["reference"], None, FORMS["grammar"], FORMS["choice"]]
    options = WAYS[way]
    alone = [
        decoded(vlm, [asked(vlm, form, "autoregressive", **options)])[0].output_token_ids
        for form in forms
    ]
    for strategy in ("autoregressive", *strategies.values()):
        for rows in ([0, 1, 2], [1, 4, 3], [5, 0, 1, 3, 2, 4]):
            requests = decoded(vlm, [asked(vlm, forms[row], strategy, **options) for row in rows])
            assert [one.output_token_ids for one in requests] == [alone[row] for row in rows]


def test_drafts_never_propose_what_the_form_forbids(
    vlm: VisionLanguageModel, strategies: dict[str, Strategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted = 0
    for strategy in strategies.values():
        seen: list[tuple[list[int], list[int]]] = []
        draft = strategy.draft

        def noted(batch: Any, limits: Any, draft: Any = draft, seen: Any = seen) -> Any:
            found = draft(batch, limits)
            seen.extend(
                (list(one), row) for one, row in zip(batch.replies, found.rows, strict=True)
            )
            return found

        with monkeypatch.context() as patch:
            # Strategies are frozen dataclasses, some of them.
            patch.setattr(type(strategy), "draft", lambda _, *given, noted=noted: noted(*given))
            decoded(vlm, [asked(vlm, FORMS["long string"], strategy, **SAMPLED)])
        rule = vlm.grammars.constraint(FORMS["long string"], vlm.end_tokens)
        assert rule is not None
        for reply, row in seen:
            for place, token in enumerate(row):
                mask = rule.allowed([*reply, *row[:place]], len(vlm.tokenizer))
                assert mask is not None
                assert mask[token]
                drafted += 1
    assert drafted > 200


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
    rule = vlm.grammars.constraint(StructuredOutput("regex", pattern), vlm.end_tokens)
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
        made = vlm.grammars.constraint(FORMS[name], vlm.end_tokens)
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
    rule = vlm.grammars.constraint(FORMS["boolean"], vlm.end_tokens)
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
    rule = vlm.grammars.constraint(FORMS["boolean"], vlm.end_tokens)
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
    rule = vlm.grammars.constraint(StructuredOutput("choice", ["yes"]), vlm.end_tokens)
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
    before = asked(vlm, FORMS["object"], "prompt-lookup")
    vlm.engine.add(before)
    vlm.engine.step()
    started = time.perf_counter()
    with pytest.raises(InputError) as error:
        asked(vlm, StructuredOutput(kind, value), "autoregressive")  # type: ignore[arg-type]
    assert time.perf_counter() - started < 2, "a machine that is busy has twice the time"
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    while not before.finished:
        vlm.engine.step()
    assert before.finish_reason in ("stop", "length")


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){1000}", "(a|b)*c(a|b){300}"])
def test_what_is_large_keeps_nobody_waiting(pattern: str, vlm: VisionLanguageModel) -> None:
    started = time.perf_counter()
    vlm.grammars.constraint(StructuredOutput("regex", pattern), vlm.end_tokens)
    assert time.perf_counter() - started < 2


def test_anything_else_is_no_form(vlm: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="StructuredOutput"):
        vlm.request("What is it?", structured={"type": "string"})


def test_without_the_library_it_says_what_to_install(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'fastvlm\[structured\]'"):
        asked(vlm, StructuredOutput("regex", "never compiled"), "autoregressive")


def test_equal_forms_are_compiled_once(vlm: VisionLanguageModel) -> None:
    one, other = (StructuredOutput("json", {"const": "once"}) for _ in range(2))
    assert {one, other} == {StructuredOutput("json", '{"const": "once"}')}
    first, second = (vlm.grammars.constraint(form, vlm.end_tokens) for form in (one, other))
    assert first is not None
    assert second is not None
    assert first is not second
    assert first._grammar is second._grammar


def test_a_model_without_an_end_is_refused(vlm: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="ends it"):
        vlm.grammars.constraint(FORMS["boolean"], ())


def test_a_reply_that_can_no_longer_have_its_form_fails_alone(vlm: VisionLanguageModel) -> None:
    class Stuck(Constraint):
        def _computed(self) -> torch.Tensor:
            found = super()._computed()
            return found if len(self._tokens) < 6 else torch.zeros_like(found)

    strategy = vlm.strategy("prompt-lookup")
    good = [asked(vlm, FORMS["object"], strategy), asked(vlm, None, strategy)]
    expected = [one.output_token_ids for one in decoded(vlm, good)]
    good = [asked(vlm, FORMS["object"], strategy), asked(vlm, None, strategy)]
    bad = asked(vlm, FORMS["object"], strategy)
    rule = bad.sampler.constraint
    assert rule is not None
    stuck = Stuck(rule._grammar, len(vlm.tokenizer), vlm.end_tokens)
    bad.sampler = Sampler(constraint=stuck)
    vlm.engine.run_all([good[0], bad, good[1]])
    assert isinstance(bad.error, InputError)
    assert bad.output_token_ids == expected[0][:6]
    assert [one.output_token_ids for one in good] == expected


def test_a_cancelled_request_leaves_the_others(vlm: VisionLanguageModel) -> None:
    strategy = vlm.strategy("layer-skip")
    [plain] = decoded(vlm, [asked(vlm, FORMS["reference"], strategy)])
    requests = [asked(vlm, FORMS["reference"], strategy) for _ in range(3)]
    for request in requests:
        vlm.engine.add(request)
    vlm.engine.step()
    vlm.engine.step()
    vlm.engine.cancel(requests[1])
    while not all(request.finished for request in requests):
        vlm.engine.step()
    assert requests[1].finish_reason == "cancelled"
    for request in (requests[0], requests[2]):
        assert request.output_token_ids == plain.output_token_ids


def test_two_threads(vlm: VisionLanguageModel, strategies: dict[str, Strategy]) -> None:
    names = ["object", "reference", "grammar", "boxes"]
    strategy = strategies["imitation"]
    expected = [
        decoded(vlm, [asked(vlm, FORMS[name], "autoregressive", **SAMPLED)])[0].output_token_ids
        for name in names
    ]
    vlm.grammars._compiled.clear()
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = [
            decoded(vlm, [asked(vlm, FORMS[name], strategy, **SAMPLED)])[0].output_token_ids
            for name in names
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected, 1: expected}
