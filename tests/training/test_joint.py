"""The joint phase: the exit learns beside the last layer, and drafts for what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastvlm
from fastvlm.data.broken import BrokenRecords
from fastvlm.data.questions import scene_conversations
from fastvlm.drafting.directory import load_draft
from fastvlm.training.draft import train_draft
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.joint import JointPlan, JointTask, train_joint
from fastvlm.training.replies import (
    Example,
    TrainingPrompt,
    data_replies,
    own_replies,
    questions_of,
)
from fastvlm.training.schedule import Schedule
from fastvlm.vlm import VisionLanguageModel
from tests.models import IMAGE_SIZE, small_vlm
from tests.processors import saved

EXIT = 2


def asked_of(number: int) -> list[TrainingPrompt]:
    return questions_of(scene_conversations(range(number), IMAGE_SIZE), BrokenRecords())


@pytest.fixture
def vlm() -> VisionLanguageModel:
    return small_vlm()


@pytest.fixture
def examples(vlm: VisionLanguageModel) -> list[Example]:
    return data_replies(vlm, asked_of(4))


def naive(vlm: VisionLanguageModel, example: Example) -> tuple[float, float]:
    """The cross-entropy of a reply at the last layer and at the exit, by transformers alone."""
    prompt = vlm.prompts.decoder_inputs(example.messages)
    reply = torch.tensor(example.reply)
    embedded = vlm.model.get_input_embeddings()(reply)
    x = torch.cat((prompt.embeddings, embedded))[None]
    out = vlm.model(inputs_embeds=x, output_hidden_states=True)
    places = range(len(prompt.token_ids) - 1, x.shape[1] - 1)
    early = vlm.model.lm_head(vlm.model.model.language_model.norm(out.hidden_states[EXIT]))
    return tuple(
        float(-logits[0, places].log_softmax(-1)[range(len(reply)), reply].sum().detach())
        for logits in (out.logits, early)
    )


@torch.no_grad()
def test_the_loss_is_that_of_the_last_layer_and_of_the_exit(
    vlm: VisionLanguageModel, examples: list[Example]
) -> None:
    found = JointTask(vlm, examples, JointPlan(EXIT, weight=0.3)).loss(examples)
    final, early = (sum(parts) for parts in zip(*(naive(vlm, e) for e in examples), strict=True))
    number = sum(len(example.reply) for example in examples)
    assert found.weight == number
    assert found.report["final"] == pytest.approx((final, number))
    assert found.report[f"exit {EXIT}"] == pytest.approx((early, number))
    assert float(found.total) == pytest.approx(final + 0.3 * early)


def test_layers_and_norm_learn_and_nothing_else(
    vlm: VisionLanguageModel, examples: list[Example]
) -> None:
    task = JointTask(vlm, examples, JointPlan(EXIT, batch=2))
    task.loss(task.draw(0)).total.backward()
    learnt = {name for name, p in vlm.model.named_parameters() if p.grad is not None}
    decoder = "model.language_model."
    assert learnt == {
        name
        for name, _ in vlm.model.named_parameters()
        if name.startswith((decoder + "layers.", decoder + "norm."))
    }


def test_the_exit_learns_and_a_draft_for_the_new_target_is_lossless(tmp_path: Path) -> None:
    vlm = small_vlm(torch.float32)
    asked = asked_of(4)
    examples = data_replies(vlm, asked)
    plan = JointPlan(EXIT, batch=4)
    with torch.no_grad():
        before = JointTask(vlm, examples, plan).loss(examples).report
    schedule = Schedule(steps=12, learning_rate=3e-3, warmup=2, weight_decay=0.0)
    train_joint(vlm, examples, plan, schedule, tmp_path / "model")
    tuned = fastvlm.load(tmp_path / "model")
    with torch.no_grad():
        after = JointTask(tuned, examples, plan).loss(examples).report
    for name in before:
        assert after[name][0] < 0.8 * before[name][0], name
    replies = own_replies(tuned, asked, tmp_path, BrokenRecords(), max_new_tokens=16)
    short = Schedule(steps=2, learning_rate=1e-3, warmup=1)
    plans = {"block": DraftPlan("block", EXIT, draft_vocabulary=60)}
    train_draft(tuned, plans, replies, tmp_path / "drafts", short)
    network = load_draft(tmp_path / "drafts" / "block", tuned.model)
    strategy = tuned.strategy(network=network, num_speculative_tokens=3, confidence=0)
    for one, example in zip(asked, replies, strict=True):
        found = tuned.generate(one.messages, strategy=strategy, max_new_tokens=16)
        assert tuple(found.token_ids) == example.reply


@pytest.mark.parametrize("family", ["llava", "blip2-t5"])
def test_any_family_has_the_phase(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "model")
    vlm = fastvlm.load(tmp_path / "model", dtype=torch.float64)
    examples = data_replies(vlm, asked_of(2))
    plan = JointPlan(1, batch=2)
    with torch.no_grad():
        before = JointTask(vlm, examples, plan).loss(examples).total
    schedule = Schedule(steps=3, learning_rate=1e-3, warmup=0, weight_decay=0.0)
    train_joint(vlm, examples, plan, schedule, tmp_path / "tuned")
    tuned = fastvlm.load(tmp_path / "tuned", dtype=torch.float64)
    with torch.no_grad():
        after = JointTask(tuned, examples, plan).loss(examples).total
    assert float(after) < float(before)
