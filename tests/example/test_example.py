"""The example model: it sees, and speculation changes none of its tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastvlm_example
from fastvlm.data.broken import BrokenRecords
from fastvlm.data.questions import Question
from fastvlm.decoding import SamplingParams
from fastvlm.drafting import FixedLength
from fastvlm.drafting.directory import load_draft
from fastvlm.evaluation.audit import audit
from fastvlm.prompts import question
from fastvlm.training.draft import DraftTask
from fastvlm.training.replies import TrainingPrompt, own_replies
from fastvlm.vlm import VisionLanguageModel, load
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import score_all
from tests.decoding.conftest import decoding_acceptance
from tests.models import about_scenes

SCENES = about_scenes(range(HELD_OUT_SCENES + 5000, HELD_OUT_SCENES + 5012))
PHOTOS = [
    Question(fastvlm_example.DESCRIPTION_PROMPT, str(path))
    for path in sorted(fastvlm_example.IMAGES.glob("*.jpg"))
]


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return load()


@pytest.mark.parametrize("questions", [SCENES, PHOTOS], ids=["scenes", "photos"])
def test_every_strategys_tokens_are_transformers_own(
    vlm: VisionLanguageModel, questions: list, tmp_path: Path
) -> None:
    mlp = load_draft(fastvlm_example.DRAFT_MLP, vlm.model)
    strategies = {
        "autoregressive": vlm.strategy("autoregressive"),
        "imitation": vlm.strategy("imitation"),
        "imitation-mlp": vlm.strategy("imitation", network=mlp),
        "early-exit": vlm.strategy("early-exit"),
        "layer-skip": vlm.strategy("layer-skip"),
        "prompt-lookup": vlm.strategy("prompt-lookup"),
    }
    params = SamplingParams(max_new_tokens=140)
    found = audit(vlm, strategies, questions, tmp_path / "audit.jsonl", params=params)
    for name in strategies:
        assert found.identical(name) + found.ties(name) == len(questions)


def test_the_facts_of_unseen_scenes_are_right(vlm: VisionLanguageModel) -> None:
    images = [question.open(vlm.image_size) for question in SCENES]
    replies = vlm.generate_batch([question.prompt for question in SCENES], images)
    seeds = [int(one.image) for one in SCENES]
    assert score_all(seeds, [reply.text for reply in replies])["accuracy"] >= 0.95


def test_acceptance_in_training_is_acceptance_in_decoding(
    vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    """Teacher forcing over whole replies is what serving does: within two points."""
    questions = SCENES + PHOTOS
    asked = [
        TrainingPrompt("", tuple(question(q.prompt, q.open(vlm.image_size))), "") for q in questions
    ]
    examples = own_replies(vlm, asked, tmp_path, BrokenRecords())
    assert vlm.network is not None
    report = DraftTask(vlm, {"it": vlm.network}, examples).loss(examples).report
    accepted = decoding_acceptance(vlm, questions, FixedLength(4))
    agree, over = report["it agree"]
    assert accepted == pytest.approx(agree / over, abs=0.02)


def test_what_ships_names_no_place_on_a_machine() -> None:
    for file in fastvlm_example.FOLDER.rglob("*.json"):
        assert not re.search(r'"/\w+/', file.read_text(encoding="utf-8")), file
