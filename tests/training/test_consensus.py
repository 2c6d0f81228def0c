"""Self-critical training: a model's own sentences, and how people's captions reward them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.conversations import Broken, Conversation, Records
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import InputError
from fastvlm.language.structure import text_decoder
from fastvlm.prompts.messages import question
from fastvlm.training.consensus import (
    SAMPLES,
    CaptionedRow,
    CaptionedRowMaker,
    ConsensusTask,
    advantages,
    consensus_of,
    consensus_task,
)
from fastvlm.training.instruction import tune_model
from fastvlm.training.paper_stages import PaperStage
from fastvlm.training.parts import learning
from fastvlm.training.rows import FastViTHDRows, rows_for
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


def shown(examples: list[CaptionedRow]) -> tuple[list[Tensor], list[Tensor]]:
    return [one.prompt for one in examples], [one.pixels for one in examples]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replies_are_drawn_to_each_images_own_prompt(checkpointing: bool) -> None:
    task, rows = task_of()
    rollouts = task.critic.rollouts
    examples = examples_of(task)
    assert len({len(one.prompt) for one in examples}) == 2
    sampling = {"times": 4, "do_sample": True, "top_k": 0, "max_new_tokens": 24}
    torch.manual_seed(1)
    expected = rollouts.decode(*shown(examples), **sampling)
    decoder: Any = text_decoder(task.model)
    if checkpointing:
        decoder.activation_checkpointing_enable()
    torch.manual_seed(1)
    found = rollouts.decode(*shown(examples), **sampling)
    assert found == expected
    assert decoder.training
    assert [len(replies) for replies in found] == [4] * 3
    said = [reply for replies in found for reply in replies]
    assert all(rows.image not in reply for reply in said)
    assert all(rows.end not in reply[:-1] for reply in said)
    assert all(rollouts.has_ended(reply) or len(reply) == 24 for reply in said)
    assert len({tuple(reply) for reply in said}) > 4


def test_a_rollout_that_is_interrupted_leaves_the_decoder_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, _ = task_of()

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(task.model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        task.critic.rollouts.decode(*shown(examples_of(task)), max_new_tokens=4)
    assert text_decoder(task.model).training


def test_a_shorter_prompt_is_answered_as_it_is_alone() -> None:
    task, rows = task_of()
    examples = examples_of(task)
    replies = task.critic.rollouts.decode(*shown(examples), do_sample=False, max_new_tokens=24)
    for one, [reply] in zip(examples, replies, strict=True):
        alone = task.model.generate(
            input_ids=one.prompt[None],
            pixel_values=one.pixels.double(),
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=[rows.image],
        )
        assert reply == alone[0, len(one.prompt) :].tolist()


def test_a_reply_costs_what_it_costs_alone() -> None:
    task, rows = task_of()
    examples = examples_of(task)
    replies = [[[10, 11, 12], [20, rows.end]] for _ in examples]
    found = iter(task.critic.rollouts.losses(*shown(examples), replies))
    for one, said in zip(examples, replies, strict=True):
        for reply in said:
            tokens = torch.cat([one.prompt, torch.tensor(reply)])
            pixels = one.pixels.double()
            logits = task.model(input_ids=tokens[None], pixel_values=pixels).logits[0]
            likely = logits[len(one.prompt) - 1 : -1].log_softmax(-1)
            for place, token in enumerate(reply):
                torch.testing.assert_close(next(found), -likely[place, token])
    assert next(found, None) is None


def test_a_sentence_that_people_said_is_worth_most() -> None:
    task, rows = task_of()
    [example] = [one for one in examples_of(task) if "red" in one.captions[0]]

    def worth(text: str, *, ended: bool = True) -> float:
        reply = rows.tokenizer.encode(text, add_special_tokens=False)
        return task.critic.reward(reply + [rows.end] * ended, example.captions)

    assert worth("A red square.") > worth("A red square.", ended=False)
    assert worth("A red square.") > worth("A blue circle.") == 0


def test_samples_are_set_against_the_others_of_their_photo() -> None:
    found = advantages(torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]))
    # Against the mean of the other two: -1.5, 0, 1.5.
    assert found[0].tolist() == pytest.approx([-float(found[0, 2]), 0.0, float(found[0, 2])])
    assert float(found[0, 2]) > 0
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert float(found.std()) == pytest.approx(1.0)


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
    monkeypatch.setattr(task.critic.rollouts, "decode", lambda *_, **__: replies)
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
        with torch.no_grad():
            before = task.critic.rollouts.losses(*shown(examples), replies)
            for parameter in task.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-5)
            gained = before - task.critic.rollouts.losses(*shown(examples), replies)
    lengths = [len(reply) for said in replies for reply in said]
    means = [float(part.mean()) for part in gained.split(lengths)]
    for place in range(0, len(means), SAMPLES):
        # The others share tokens with it, so that one of them may gain a little too.
        assert means[place] > 0 > sum(means[place + 1 : place + SAMPLES])


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
