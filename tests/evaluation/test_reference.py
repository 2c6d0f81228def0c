"""Strategies are held against `transformers` and float64 in the same way for every family."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvlm
from fastvlm.data.questions import Question
from fastvlm.decoding import SamplingParams, Strategy
from fastvlm.evaluation import benchmark, reference
from fastvlm.evaluation.audit import audit
from fastvlm.evaluation.benchmark import measure
from fastvlm.evaluation.measuring import rotated, run_request
from fastvlm.evaluation.reference import (
    ExactModel,
    best_gap,
    dialogue_of,
    generate_greedily,
    reference_replies,
)
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel
from tests.families import FAMILIES
from tests.models import small_vlm
from tests.processors import PROCESSORS, TEXT_TEMPLATE, character_tokenizer, sample_image

QUESTIONS = [Question("What is it?", 1), Question("Name what is there.", 2)]
NAMES = ("autoregressive", "early-exit", "layer-skip", "prompt-lookup")
SHORT = SamplingParams(max_new_tokens=8)
WRITERS = ["llava", "qwen2.5-vl", "smolvlm", "blip2-opt", "blip2-t5", "instructblip-t5"]


def built(family: str, dtype: torch.dtype = torch.float64) -> VisionLanguageModel:
    model, _ = FAMILIES[family]()
    return VisionLanguageModel(model.to(dtype).eval(), PROCESSORS[family]())


def text_vlm() -> VisionLanguageModel:
    model, _ = FAMILIES["llama"]()
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    return VisionLanguageModel(model.eval(), tokenizer)


def strategies(vlm: VisionLanguageModel) -> dict[str, Strategy]:
    return {name: vlm.strategy(name) for name in NAMES}


@pytest.mark.parametrize("family", WRITERS)
def test_every_family_is_measured_and_audited(family: str, tmp_path: Path) -> None:
    vlm = built(family)
    for result in measure(vlm, strategies(vlm), QUESTIONS, params=SHORT).results:
        assert (result.identical, result.different, result.replies) == (True, 0, 2)
        assert result.tokens > 1
    found = audit(vlm, strategies(vlm), QUESTIONS, tmp_path / "audit.jsonl", params=SHORT)
    expected = reference_replies(vlm, [dialogue_of(vlm, one) for one in QUESTIONS], 8)
    assert list(found.replies.values()) == expected
    assert [found.identical(name) for name in NAMES] == [2] * 4


def test_a_model_of_text_alone_is_asked_without_images(tmp_path: Path) -> None:
    vlm = text_vlm()
    asked = [Question("What is it?", None), Question("And this?", None)]
    for result in measure(vlm, strategies(vlm), asked, params=SHORT).results:
        assert (result.identical, result.different) == (True, 0)
    found = audit(vlm, strategies(vlm), asked, tmp_path / "audit.jsonl")
    assert [found.identical(name) for name in NAMES] == [2] * 4
    with pytest.raises(InputError, match="reads text alone"):
        measure(vlm, strategies(vlm), QUESTIONS)


@pytest.mark.parametrize("family", WRITERS)
def test_exact_logits_are_those_of_generate_in_float64(family: str) -> None:
    short = built(family, torch.float32)
    vlm = VisionLanguageModel(copy.deepcopy(short.model).double(), short.processor)
    messages = dialogue_of(vlm, QUESTIONS[0])
    inputs = short.prompts.inputs(messages)
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    # Both are shown what the short model is shown.
    out = vlm.model.generate(
        **wide, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    [reply] = generate_greedily(vlm, wide, 6)
    with ExactModel(short) as exact:
        for place, expected in enumerate(out.logits):
            found = exact.logits(inputs, reply[:place])
            assert found.dtype == torch.float64
            # `generate` returns them in float32.
            torch.testing.assert_close(found, expected[0].double(), rtol=1e-6, atol=1e-6)
    assert short.decoder.dtype == torch.float32


def test_ten_differences_copy_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = small_vlm(torch.float32)
    messages = dialogue_of(vlm, QUESTIONS[0])
    [reply] = reference_replies(vlm, [messages], 12)
    copies: list[Any] = []
    kept = copy.deepcopy

    def counted(one: Any, *args: Any) -> Any:
        copies.append(one)
        return kept(one, *args)

    monkeypatch.setattr(reference.copy, "deepcopy", counted)
    with ExactModel(vlm) as exact:
        for place in range(10):
            other = [*reply[:place], reply[place] + 1]
            found, gap = best_gap(exact, messages, reply, other)
            assert found == place
            assert gap > 0
    assert [one for one in copies if one is vlm.model] == [vlm.model]
    with ExactModel(vlm):
        pass
    assert len([one for one in copies if one is vlm.model]) == 1


def test_the_gap_of_a_sampled_reply_is_with_its_noise() -> None:
    vlm = small_vlm()
    messages, options = dialogue_of(vlm, QUESTIONS[0]), {"temperature": 0.8, "seed": 5}
    request = run_request(
        vlm, vlm.strategy("autoregressive"), messages, max_new_tokens=8, **options
    )
    reply, inputs = request.output_token_ids, vlm.prompts.inputs(messages)
    with ExactModel(vlm) as exact:
        for place, token in enumerate(reply):
            other = [*reply[:place], token + 1]
            found, gap = best_gap(exact, messages, reply, other, **options)
            logits = exact.logits(inputs, reply[:place])
            # The token that was drawn is the greatest with the noise; lower it by the gap, and it
            # is so no longer.
            for shift, same in ((0.5, True), (2.0, False)):
                lowered = logits.clone()
                lowered[token] -= shift * gap * 0.8
                drawn = request.sampler.sample(reply[:place], [], lowered[None])[0]
                assert (drawn == token) is same
            assert found == place


def test_sampled_replies_are_held_against_our_ordinary_ones(tmp_path: Path) -> None:
    vlm = small_vlm(max_slots=3)
    params = SamplingParams(0.9, seed=7, max_new_tokens=10)
    asked = [Question("What is it?", number) for number in range(5)]
    found = audit(vlm, strategies(vlm), asked, tmp_path / "a.jsonl", params=params)
    assert [found.identical(name) for name in NAMES] == [5] * 4
    for number, question in enumerate(asked):
        reply = vlm.generate(
            dialogue_of(vlm, question), strategy="autoregressive", temperature=0.9, seed=7 + number,
            max_new_tokens=10,
        )  # fmt: skip
        assert reply.token_ids == found.replies[number]
    wide = audit(vlm, strategies(vlm), asked[:2], tmp_path / "b.jsonl", params=params, wide=True)
    assert [wide.identical(name) for name in NAMES] == [2] * 4
    with pytest.raises(InputError, match="belongs to an audit"):
        audit(vlm, strategies(vlm), asked, tmp_path / "a.jsonl")


def test_a_decoder_with_weights_of_its_own_is_its_own_reference(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    vlm = fastvlm.load(quantize="int4")
    names = ("autoregressive", "imitation")
    chosen = {name: vlm.strategy(name) for name in names}
    asked = [Question("Describe the scene.", number) for number in range(2)]
    found = measure(vlm, chosen, asked, params=SHORT).results
    # The model itself has more bits, and says something else.
    assert {one.strategy for one in found if one.identical} >= set(names)
    audited = audit(vlm, chosen, asked, tmp_path / "audit.jsonl", params=SHORT)
    assert [audited.identical(name) for name in names] == [2, 2]
    for number, question in enumerate(asked):
        asked_again = dialogue_of(vlm, question)
        reply = vlm.generate(asked_again, strategy="autoregressive", max_new_tokens=8)
        assert audited.replies[number] == reply.token_ids


def test_a_stopped_audit_goes_on_with_what_it_found(tmp_path: Path) -> None:
    vlm = small_vlm(torch.float32, max_slots=2)

    asked = [Question(f"What is it{'?' * number}", number) for number in range(4)]
    params, file = SamplingParams(max_new_tokens=6), tmp_path / "audit.jsonl"
    whole = audit(vlm, strategies(vlm), asked, file, params=params)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    again = audit(vlm, strategies(vlm), asked, file, params=params)
    assert (again.replies, again.differences) == (whole.replies, whole.differences)
    assert file.read_text().startswith("".join(lines[:2]))


@pytest.fixture
def some_broken(tmp_path: Path) -> tuple[list[Question], set[int]]:
    """Questions, and the numbers of those whose image is gone."""
    asked = [Question("What is it?", number) for number in range(7)]
    broken = {0, 3, 4}
    for number in broken:
        asked[number] = Question("What is it?", str(tmp_path / f"gone-{number}.png"))
    return asked, broken


def test_a_question_that_fails_is_left_out_of_every_figure(
    some_broken: tuple[list[Question], set[int]], tmp_path: Path
) -> None:
    vlm = small_vlm(torch.float32, max_slots=4)
    asked, broken = some_broken
    failed: list[Question] = []

    def leave_out(question: Question, error: InputError) -> None:
        assert str(question.image) in str(error)
        failed.append(question)

    sound = [question for number, question in enumerate(asked) if number not in broken]
    results = measure(vlm, strategies(vlm), asked, params=SHORT, failed=leave_out).results
    assert [(one.replies, one.identical) for one in results] == [(len(sound), True)] * 5
    assert failed == [asked[number] for number in sorted(broken)]
    failed.clear()
    params, file = SamplingParams(max_new_tokens=6), tmp_path / "audit.jsonl"
    found = audit(vlm, strategies(vlm), asked, file, params=params, failed=leave_out)
    assert failed == [asked[number] for number in sorted(broken)]
    replies = [vlm.generate(dialogue_of(vlm, one), max_new_tokens=6).token_ids for one in sound]
    assert list(found.replies.values()) == replies
    assert [found.identical(name) for name in NAMES] == [len(sound)] * 4
    # What was mended is asked when the audit goes on, and nothing else.
    sample_image(3).save(str(asked[3].image))
    failed.clear()
    lines = len(file.read_text().splitlines())
    again = audit(vlm, strategies(vlm), asked, file, params=params, failed=leave_out)
    assert failed == [asked[0], asked[4]]
    assert list(again.replies) == [1, 2, 3, 5, 6]
    assert len(file.read_text().splitlines()) == lines + 1


def test_a_question_that_fails_ends_the_work_unless_it_may(
    some_broken: tuple[list[Question], set[int]], tmp_path: Path
) -> None:
    vlm = small_vlm(torch.float32)
    asked, broken = some_broken
    gone = [asked[number] for number in broken]
    with pytest.raises(InputError, match="gone-0"):
        measure(vlm, strategies(vlm), asked, params=SHORT)
    with pytest.raises(InputError, match="gone-0"):
        audit(vlm, strategies(vlm), asked, tmp_path / "a.jsonl")
    for call in (
        lambda: measure(vlm, strategies(vlm), gone, failed=lambda *_: None),
        lambda: audit(vlm, strategies(vlm), gone, tmp_path / "b.jsonl", failed=lambda *_: None),
    ):
        with pytest.raises(InputError, match="None of the questions"):
            call()
    (tmp_path / "a.jsonl").write_text(
        (tmp_path / "a.jsonl").read_text() + '{"replies": [[1, 2]], "seconds": 1}\n'
    )
    with pytest.raises(InputError, match=r"a\.jsonl"):
        audit(vlm, strategies(vlm), asked, tmp_path / "a.jsonl")


def test_what_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = small_vlm(torch.float32)
    dialogues = [dialogue_of(vlm, question) for question in QUESTIONS]
    expected = reference_replies(vlm, dialogues, 6)
    wrong = [expected[0], [*expected[1][:3], expected[1][3] + 1]]
    monkeypatch.setattr("fastvlm.evaluation.audit.reference_replies", lambda *_: wrong)
    params = SamplingParams(max_new_tokens=6)
    found = audit(vlm, strategies(vlm), QUESTIONS, tmp_path / "audit.jsonl", params=params)
    for name in NAMES:
        assert (found.identical(name), found.ties(name)) == (1, 0)
        [difference] = found.differences[name]
        assert (difference.question, difference.position) == (1, 3)
        assert difference.gap > found.gap
        assert found.to_json()[name]["different"] == 1


def test_every_strategy_is_first_as_often() -> None:
    orders = [rotated(["a", "b", "c"], number) for number in range(3)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_kinds_are_measured_apart() -> None:
    vlm = text_vlm()
    texts = {"a": ["One", "Two"], "b": ["Three"], "": ["Four"]}
    asked = [Question(text, None, kind) for kind in texts for text in texts[kind]]
    found = measure(vlm, strategies(vlm), asked, params=SHORT)
    assert {kind: [one.replies for one in rows] for kind, rows in found.kinds.items()} == {
        "a": [2] * 5,
        "b": [1] * 5,
    }
    assert [one.replies for one in found.results] == [4] * 5
    alone = measure(vlm, strategies(vlm), asked[2:3], params=SHORT)
    for mine, expected in zip(found.kinds["b"], alone.results, strict=True):
        assert (mine.tokens, mine.identical) == (expected.tokens, True)


def test_sampled_replies_are_held_against_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = text_vlm()
    asked = [Question(text, None) for text in ("One", "Two", "Three")]
    params = SamplingParams(1.0, seed=5, max_new_tokens=8)
    found = measure(vlm, strategies(vlm), asked, params=params).results
    assert [one.strategy for one in found] == list(NAMES)
    assert all(one.identical and not one.different for one in found)
    assert all(one.speedup_vs_transformers is None for one in found)
    # A strategy that draws with another seed is found out.
    taken = benchmark.options_of

    def shifted(drawn: SamplingParams) -> dict[str, Any]:
        return {**taken(drawn), "seed": next(seeds)}

    seeds = itertools.count()
    monkeypatch.setattr(benchmark, "options_of", shifted)
    assert not all(
        one.identical for one in measure(vlm, strategies(vlm), asked, params=params).results
    )
