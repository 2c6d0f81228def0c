"""A draft for a model of any family: it learns from real photos and drafts losslessly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import fastvlm
import fastvlm_example
from fastvlm.data.broken import BrokenRecords
from fastvlm.data.questions import images_in
from fastvlm.drafting.directory import load_draft
from fastvlm.prompts import question
from fastvlm.training.draft import DraftTask, new_network, train_draft
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.held_out import decode_held_out
from fastvlm.training.replies import TrainingPrompt, own_replies
from fastvlm.training.schedule import Schedule
from tests.families import replies
from tests.processors import PROCESSORS, asked, saved

PHOTOS = [path for path in images_in(fastvlm_example.IMAGES) if path.suffix == ".jpg"][:4]
QUESTIONS = ["What is it?", "Where is A?", "How many b?", "Say a word."]


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_draft_learns_from_photos_and_drafts_losslessly(family: str, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = saved(family, tmp_path / "model")
    vlm = fastvlm.load(tmp_path / "model", dtype=torch.float64)
    turns = [
        TrainingPrompt(text, tuple(question(text, path)), "")
        for text, path in zip(QUESTIONS, PHOTOS, strict=True)
    ]
    examples = own_replies(vlm, turns, tmp_path, BrokenRecords(), max_new_tokens=12)
    assert sum(len(example.reply) for example in examples) > 8

    # All of the target's other layers agree with it: each row's prompt, positions and source count.
    depth = vlm.decoder.depth
    whole = DraftPlan("block", 1, blocks=depth - 1, draft_vocabulary=0)
    perfect = new_network(vlm, whole, examples).double()
    losses = DraftTask(vlm, {"perfect": perfect}, examples).loss(examples)
    assert losses.report["perfect agree"] == (losses.weight, losses.weight)
    assert losses.report["perfect kl"][0] == pytest.approx(0, abs=1e-6)

    plans = {
        "block": DraftPlan("block", 1, draft_vocabulary=60),
        "mlp": DraftPlan("mlp", 2, draft_vocabulary=0),
    }
    schedule = Schedule(steps=3, learning_rate=1e-3, warmup=1)
    networks = train_draft(vlm, plans, examples, tmp_path / "drafts", schedule)
    measured = decode_held_out(vlm, networks, turns, max_new_tokens=12)
    assert all(found.acceptance_length >= 1 for found in measured.values())
    expected = [
        replies(model, asked(processor, [text], [Image.open(path)]), 12)[0]
        for text, path in zip(QUESTIONS, PHOTOS, strict=True)
    ]
    for name in plans:
        strategy = vlm.strategy(
            network=load_draft(tmp_path / "drafts" / name, vlm.model),
            num_speculative_tokens=3,
            confidence=0,
        )
        together = vlm.generate_batch(QUESTIONS, PHOTOS, strategy=strategy, max_new_tokens=12)
        assert [reply.token_ids for reply in together] == expected
