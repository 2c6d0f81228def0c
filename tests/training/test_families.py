"""A draft for a model of any family: it learns from real photos and drafts losslessly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
from fastvlm.vlm import VisionLanguageModel
from tests.families import END, NEWER, NEWER_WITH_IMAGES, PAD, Inputs, replies
from tests.processors import (
    NEWER_PROCESSORS,
    PROCESSORS,
    TEXT_TEMPLATE,
    asked,
    character_tokenizer,
    saved,
)

PHOTOS = [path for path in images_in(fastvlm_example.IMAGES) if path.suffix == ".jpg"][:4]
QUESTIONS = ["What is it?", "Where is A?", "How many b?", "Say a word."]


SINGLE = (
    "gemma2", "gpt-oss", "paligemma2", "t5gemma", "qwen3-vl-moe", "mixtral", "phimoe", "qwen3-moe",
)  # fmt: skip
"""Families that aren't computed in float64, or whose experts aren't as they are loaded."""
QUICK = ("cohere2", "florence2", "gemma3", "llama4-text", "mllama", "qwen3-vl", "t5gemma")
SHOWN = [name for name in NEWER_PROCESSORS if name != "kosmos-2.5"]
ASKED = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in NEWER
    if name in SHOWN or name not in NEWER_WITH_IMAGES
]


def load(family: str, folder: Path) -> tuple[VisionLanguageModel, Callable[..., Inputs], bool]:
    """Save and load a family; return what makes inputs of a question, and if it shows images."""
    dtype = torch.float32 if family in SINGLE else torch.float64
    if family in {**PROCESSORS, **NEWER_PROCESSORS}:
        _, processor = saved(family, folder)
        return fastvlm.load(folder, dtype=dtype), partial(asked, processor, dtype=dtype), True
    model, _ = NEWER[family]()
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def write(prompts: Sequence[str], _: object) -> Inputs:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    return fastvlm.load(folder, dtype=dtype), write, False


@pytest.mark.parametrize("family", [*PROCESSORS, *ASKED])
def test_a_draft_learns_and_drafts_losslessly(family: str, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    vlm, inputs_of, shows = load(family, tmp_path / "model")
    photos = PHOTOS if shows else [None] * len(QUESTIONS)
    turns = [
        TrainingPrompt(text, tuple(question(text, path)), "")
        for text, path in zip(QUESTIONS, photos, strict=True)
    ]
    examples = own_replies(vlm, turns, tmp_path, BrokenRecords(), max_new_tokens=12)
    assert sum(len(example.reply) for example in examples) > 8

    # All of the target's other layers agree with it: each row's prompt, positions, source and what
    # is added to states count.
    whole = DraftPlan("block", 1, blocks=vlm.decoder.depth - 1, draft_vocabulary=0)
    perfect = new_network(vlm, whole, examples).to(vlm.decoder.dtype)
    losses = DraftTask(vlm, {"perfect": perfect}, examples).loss(examples)
    assert losses.report["perfect agree"] == (losses.weight, losses.weight)
    close = 1e-4 if family in SINGLE else 1e-6
    assert losses.report["perfect kl"][0] == pytest.approx(0, abs=close)

    plans = {
        "block": DraftPlan("block", 1, draft_vocabulary=60),
        "mlp": DraftPlan("mlp", 2, draft_vocabulary=0),
    }
    schedule = Schedule(steps=3, learning_rate=1e-3, warmup=1)
    networks = train_draft(vlm, plans, examples, tmp_path / "drafts", schedule)
    if family in PROCESSORS:
        measured = decode_held_out(vlm, networks, turns, max_new_tokens=12)
        assert all(found.acceptance_length >= 1 for found in measured.values())
    expected = [
        replies(vlm.model, inputs_of([text], [path and Image.open(path)]), 12)[0]
        for text, path in zip(QUESTIONS, photos, strict=True)
    ]
    for name in plans:
        strategy = vlm.strategy(
            network=load_draft(tmp_path / "drafts" / name, vlm.model),
            num_speculative_tokens=3,
            confidence=0,
        )
        together = vlm.generate_batch(QUESTIONS, photos, strategy=strategy, max_new_tokens=12)
        assert [reply.token_ids for reply in together] == expected
