"""The whole model's lesson: each dialogue has its own loss, and the stages make a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlm.embedded import SCENE_PROMPT
from fastvlm.scenes import describe, render, sample
from fastvlm.training.loop import Schedule
from fastvlm.training.model import (
    DecoderShape,
    Dialogue,
    ModelPlan,
    encode_dialogue,
    token_losses,
    train_model,
)
from fastvlm.vision import FastViTHD
from fastvlm.vlm import load
from tests.models import VISUAL_TOKENS, small_encoder_config, small_vlm

CAPTIONS = ("A dog runs .", "A brown dog runs fast .", "The sun")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three photographs in Flickr8k's layout."""
    folder = tmp_path / "photographs"
    (folder / "images").mkdir(parents=True)
    names = [f"{colour}.jpg" for colour in ("red", "green", "blue")]
    for name in names:
        Image.new("RGB", (40, 40), name.removesuffix(".jpg")).save(folder / "images" / name)
    lines = [f"{name}\t{caption}" for name in names for caption in CAPTIONS]
    (folder / "captions.tsv").write_text("\n".join(lines))
    (folder / "train.txt").write_text("\n".join(names))
    return folder


def test_a_pass_gives_each_dialogue_the_loss_it_has_alone() -> None:
    vlm = small_vlm()
    torch.manual_seed(1)
    features = torch.randn(3, VISUAL_TOKENS, vlm.decoder.width, dtype=torch.float64)
    dialogues = []
    for seen, reply in zip(features, ("Red.", describe(sample(1)), "Two circles."), strict=True):
        tokens, labels = encode_dialogue(vlm.tokenizer, SCENE_PROMPT, reply, VISUAL_TOKENS)
        dialogues.append(Dialogue("scene", tokens, labels, seen))
    together = token_losses(vlm.model, dialogues)
    for dialogue, losses in zip(dialogues, together, strict=True):
        embeddings = vlm.model.get_input_embeddings()(dialogue.tokens[None])
        embeddings[dialogue.tokens[None] == vlm.model.config.image_token_id] = dialogue.features
        logits = vlm.model(inputs_embeds=embeddings).logits[0, :-1]
        reply = dialogue.labels[1:]
        alone = -logits.log_softmax(-1)[range(len(reply)), reply][reply >= 0]
        torch.testing.assert_close(losses, alone)


def test_the_stages_make_a_model_that_loads_and_replies(tmp_path: Path, photographs: Path) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    shape = DecoderShape(layers=2, width=32, hidden=32, heads=4, kv_heads=2, vocabulary=300)
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=1, log_seconds=0)
    plan = ModelPlan(schedule, replace(schedule, steps=3), schedule)
    train_model(tmp_path / "encoder", photographs, tmp_path / "model", plan, shape)
    log = (tmp_path / "model" / "together" / "log.jsonl").read_text().splitlines()
    assert {"scene", "sentence", "description"} <= json.loads(log[-1]).keys()
    vlm = load(tmp_path / "model")
    # Nine visual tokens, one for each place of a scene.
    assert vlm.model.config.image_seq_length == 9
    assert len(vlm.generate(SCENE_PROMPT, render(sample(3), 192), max_new_tokens=5).tokens) == 5
