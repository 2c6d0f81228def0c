"""Self-critical training: a model's own sentences, and how people's captions reward them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.conversations import Broken, Conversation, Records
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import InputError
from fastvlm.prompts.messages import question
from fastvlm.training.consensus import (
    SAMPLES,
    CaptionedRow,
    CaptionedRowMaker,
    ConsensusTask,
    consensus_of,
    consensus_task,
)
from fastvlm.training.instruction import tune_model
from fastvlm.training.paper_stages import PaperStage
from fastvlm.training.parts import learning
from fastvlm.training.reply_scores import score_replies
from fastvlm.training.rows import IGNORED, FastViTHDRows, rows_for
from fastvlm.training.schedule import Schedule
from fastvlm_example.scenes import render, sample
from tests.models import IMAGE_SIZE, small_vlm
from tests.processors import saved

THINGS = {1: "red square", 2: "blue circle", 3: "green star"}


def captioned(number: int, prompt: str = "What?") -> Conversation:
    said = {"type": "text", "text": f"A {THINGS[number]} is on the left."}
    asked = question(prompt, render(sample(number), 128))
    others = (f"A {THINGS[number]}.", "There is something.")
    return Conversation(f"{number}", (*asked, {"role": "assistant", "content": [said]}), others)


def source(*found: Conversation) -> Records:
    return Records(found, lambda _, one: one, lambda _, one: one.name)


RECORDS = source(captioned(1), captioned(2, "What is in this picture?"), captioned(3))


def task_of(**overrides: Any) -> tuple[ConsensusTask, FastViTHDRows]:
    vlm = small_vlm(**overrides)
    rows = FastViTHDRows(vlm.model, vlm.tokenizer, IMAGE_SIZE)
    return consensus_task(vlm.model, rows, RECORDS, Feed(RECORDS), 3, {}), rows


def examples_of(task: ConsensusTask) -> list[CaptionedRow]:
    torch.manual_seed(0)
    return task.draw(0)


def test_samples_are_drawn_of_each_images_own_prompt() -> None:
    task, rows = task_of()
    examples = examples_of(task)
    assert len({len(one.prompt) for one in examples}) == 2
    torch.manual_seed(1)
    found = task.sample(examples)
    assert [len(replies) for replies in found] == [SAMPLES] * 3
    assert all(rows.image not in reply for replies in found for reply in replies)
    assert all(rows.end not in reply[:-1] for replies in found for reply in replies)
    assert len({tuple(reply) for replies in found for reply in replies}) > SAMPLES
    # What is before a reply in its row is what serving asks.
    for one, replies in zip(examples, found, strict=True):
        [row] = task.rows_of(one, replies)
        labelled = row.labels[row.labels != IGNORED].tolist()
        assert labelled == [token for reply in replies for token in reply]
        assert row.inputs["input_ids"][: len(one.prompt)].equal(one.prompt)


def test_a_shorter_prompt_is_answered_as_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task, rows = task_of()
    examples = examples_of(task)
    monkeypatch.setattr("fastvlm.training.consensus.SAMPLES", 1)
    monkeypatch.setattr(
        "fastvlm.training.consensus.GenerationConfig",
        lambda **options: GenerationConfig(**{**options, "do_sample": False, "top_k": None}),
    )
    for one, [reply] in zip(examples, task.sample(examples), strict=True):
        alone = task.model.generate(
            input_ids=one.prompt[None],
            pixel_values=one.pixels.double(),
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=[rows.image],
        )
        assert reply == alone[0, len(one.prompt) :].tolist()


def test_a_sentence_that_people_said_is_worth_most() -> None:
    task, rows = task_of()
    [example] = [one for one in examples_of(task) if "red" in one.captions[0]]

    def worth(text: str, *, ended: bool = True) -> float:
        reply = rows.tokenizer.encode(text, add_special_tokens=False)
        return task.reward(reply + [rows.end] * ended, example.captions)

    assert worth("A red square.") > worth("A red square.", ended=False)
    assert worth("A red square.") > worth("A blue circle.") == 0


def test_a_step_makes_the_better_samples_likelier(monkeypatch: pytest.MonkeyPatch) -> None:
    task, rows = task_of()
    examples = examples_of(task)
    replies = [
        [
            [*rows.tokenizer.encode(text, add_special_tokens=False), rows.end]
            for text in (" ".join(one.captions[1][:-1]), "A thing.", "It is.", "No.", "Yes.")
        ]
        for one in examples
    ]
    monkeypatch.setattr(task, "sample", lambda _: replies)
    # Captions alone would teach too; they are taken out.
    monkeypatch.setattr(
        "fastvlm.training.consensus.reply_loss",
        lambda *_: replace(known, total=0 * known.total.detach()),
    )
    from fastvlm.training.reply_scores import reply_loss

    with learning(task.model, "everything", 1):
        known = reply_loss(task.model, rows, [row for one in examples for row in one.taught])
        found = task.loss(examples)
        assert found.report["reward"][1] == 15
        assert found.report["reward"][0] > 0
        (found.total / found.weight).backward()
        made = [row for one, said in zip(examples, replies, strict=True)
                for row in task.rows_of(one, said)]  # fmt: skip
        lengths = [[len(reply) for reply in said] for said in replies]
        with torch.no_grad():
            before = score_replies(task.model, rows, made)
            for parameter in task.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-5)
            after = score_replies(task.model, rows, made)
    for old, new, long in zip(before, after, lengths, strict=True):
        split = zip(old.losses.split(long), new.losses.split(long), strict=True)
        gains = [float(a.mean() - b.mean()) for a, b in split]
        # The others share tokens with it, so that one of them may gain a little too.
        assert gains[0] > 0 > sum(gains[1:])


def test_images_without_a_consensus_are_refused(tmp_path: Path) -> None:
    _, rows = task_of()
    alone = replace(captioned(1), alternatives=())
    assert isinstance(CaptionedRowMaker(rows)(alone), Broken)
    asked = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    text = replace(captioned(1), messages=(asked, captioned(1).messages[-1]))
    assert isinstance(CaptionedRowMaker(rows)(text), Broken)
    with pytest.raises(InputError, match="several captions"):
        consensus_of(source(alone))
    shards: Any = object()
    with pytest.raises(InputError, match="can't be streamed"):
        consensus_of(shards)
    saved("llava", tmp_path / "model")
    model, processor = load_checkpoint(tmp_path / "model", torch.float64, "cpu")
    with pytest.raises(InputError, match="has no FastViTHD"):
        consensus_task(model, rows_for(model, processor, None), RECORDS, Feed(RECORDS), 1, {})


def test_a_run_saves_what_it_made(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    vlm = small_vlm(torch.float32)
    stage = PaperStage("lora", 1e-3, None, 2, 1, "", "consensus")
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=0)
    tune_model(vlm.model, vlm.tokenizer, RECORDS, stage, schedule, tmp_path, rank=2)
    assert (tmp_path / "config.json").is_file()
    log = (tmp_path / "training" / "log.jsonl").read_text(encoding="utf-8")
    assert '"reward"' in log
