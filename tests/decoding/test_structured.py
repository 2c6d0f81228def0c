"""Replies of a given form: valid, the same under every strategy, and nobody else's matter."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastvlm import InputError, VisionLanguageModel
from fastvlm.decoding import (
    Autoregressive,
    Engine,
    PromptLookup,
    Request,
    Sampler,
    SelfSpeculative,
    Strategy,
    StructuredOutput,
)
from fastvlm.decoding.grammar import Constraint, GrammarCompiler
from fastvlm.drafting import ConfidenceLength, FixedLength
from fastvlm.language import split_decoder
from tests.decoding.conftest import FAMILIES, finish, imitation, inputs_of, text_model
from tests.decoding.forms import FORMS
from tests.models import small_vlm
from tests.processors import character_tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

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
        "cascade": vlm.strategy("cascade", network=imitation(vlm.model).network),
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
    "reply's own": {"frequency_penalty": 1.0, "logit_bias": {5: 3.0, 40: -100.0}},
}


@pytest.mark.parametrize("name", FORMS)
def test_replies_are_valid_and_the_same_under_every_strategy(
    name: str, vlm: VisionLanguageModel, strategies: dict[str, Strategy]
) -> None:
    form = FORMS[name]
    ways = [*WAYS.values(), *({**SAMPLED, "seed": seed} for seed in (6, 7))]
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


def test_others_in_the_batch_change_nothing(
    vlm: VisionLanguageModel, strategies: dict[str, Strategy]
) -> None:
    forms = [FORMS["object"], None, FORMS["reference"], None, FORMS["grammar"], FORMS["choice"]]
    alone = [
        decoded(vlm, [asked(vlm, form, "autoregressive", **SAMPLED)])[0].output_token_ids
        for form in forms
    ]
    for strategy in ("autoregressive", *strategies.values()):
        for rows in ([0, 1, 2], [1, 4, 3], [5, 0, 1, 3, 2, 4]):
            requests = decoded(vlm, [asked(vlm, forms[row], strategy, **SAMPLED) for row in rows])
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
        rule = vlm.builder.grammars.constraint(FORMS["long string"], vlm.end_tokens)
        assert rule is not None
        for reply, row in seen:
            for place, token in enumerate(row):
                mask = rule.allowed([*reply, *row[:place]], len(vlm.tokenizer))
                assert mask is not None
                assert mask[token]
                drafted += 1
    assert drafted > 200


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
    assert 0 < len(bad.output_token_ids) <= 6
    assert bad.output_token_ids == expected[0][: len(bad.output_token_ids)]
    assert [one.output_token_ids for one in good] == expected


def test_what_must_follow_is_drafted_by_nobody(
    vlm: VisionLanguageModel, strategies: dict[str, Strategy]
) -> None:
    """Where only one token is allowed, it is drafted beside the drafter's own, and accepted."""
    form = StructuredOutput("choice", ["at the top left is a red circle", "zero objects"])
    [plain] = decoded(vlm, [asked(vlm, form, "autoregressive")])
    for strategy in strategies.values():
        [request] = decoded(vlm, [asked(vlm, form, strategy)])
        assert request.output_token_ids == plain.output_token_ids
        assert all(count <= strategy.max_draft_tokens for count in request.proposed)
    [found] = decoded(vlm, [asked(vlm, form, "prompt-lookup")])
    assert found.accepted == found.proposed
    assert len(found.proposed) <= 1 + len(plain.output_token_ids) // 8


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_forms(family: str) -> None:
    """Among them those whose cache slides, and that compute all positions anew."""
    model, tokenizer = text_model(family), character_tokenizer()
    compiler, ends = GrammarCompiler(tokenizer), frozenset({1})
    prompts = [[5, 9, 33, 7], [11, 12, 11, 12, 11], [6]]
    with pytest.raises(InputError, match="No reply"):
        compiler.constraint(FORMS["nested"], ends)  # the tokenizer knows no braces
    words = StructuredOutput("regex", "([a-z]{3} )+, thank (you|goodness)[.!]{20,}")
    forms = [words, None, StructuredOutput("choice", ["Yes, it is", "Yes, they are", "No"])]

    def replies(strategy: Strategy) -> list[list[int]]:
        requests = [
            Request(
                inputs_of(model, prompt),
                strategy,
                70,
                Sampler((), seed, (), compiler.constraint(form, ends)),
                ends,
            )
            for seed, (prompt, form) in enumerate(zip(prompts, forms, strict=True))
        ]
        finish(Engine(split_decoder(model)), requests)
        return [request.output_token_ids for request in requests]

    expected = replies(Autoregressive())
    assert re.match("([a-z]{3} )+", tokenizer.decode(expected[0]))
    for strategy in (
        PromptLookup(FixedLength(4)),
        imitation(model, length=ConfidenceLength(5, 0.2)),
    ):
        assert replies(strategy) == expected


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
    vlm.builder.grammars._compiled.clear()
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
