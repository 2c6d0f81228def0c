"""The whole model's lesson: each dialogue has its own loss, and the stages make a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from fastvlm.data.captioned import CaptionedImage
from fastvlm.functional.errors import CheckpointError
from fastvlm.training.schedule import Schedule
from fastvlm.vision import FastViTHD
from fastvlm.vlm import load
from fastvlm_example import SCENE_PROMPT
from fastvlm_example.scenes import describe, render, sample
from recipe.architecture import DecoderShape
from recipe.consensus import SAMPLES, Consensus, advantages, sample_sentences
from recipe.dialogues import Dialogue, encode_dialogue, token_losses
from recipe.model import train_model
from recipe.stages import STAGES
from tests.models import VISUAL_TOKENS, small_encoder_config, small_vlm

CAPTIONS = ("A dog runs .", "A brown dog runs fast .", "The sun")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos in Flickr8k's layout."""
    folder = tmp_path / "photos"
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


def test_the_stages_make_a_model_that_loads_and_replies(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    shape = DecoderShape(layers=2, width=32, hidden=32, heads=4, kv_heads=2, vocabulary=300)
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=1, log_seconds=0)
    stages = [replace(stage, schedule=schedule) for stage in STAGES]
    train_model(
        photos, tmp_path / "model", encoder=tmp_path / "encoder", stages=stages, shape=shape
    )
    reports = {
        stage.name: json.loads(
            (tmp_path / "model" / stage.name / "log.jsonl").read_text().splitlines()[-1]
        )
        for stage in stages
    }
    assert {"scene", "sentence", "description"} <= reports["together"].keys()
    assert reports["consensus"]["reward"] >= 0
    vlm = load(tmp_path / "model")
    # Nine visual tokens, one for each place of a scene.
    assert vlm.model.config.image_seq_length == 9
    assert len(vlm.generate(SCENE_PROMPT, render(sample(3), 192), max_new_tokens=5).token_ids) == 5


def test_a_model_goes_on_from_another_with_a_better_encoder(tmp_path: Path, photos: Path) -> None:
    schedule = Schedule(steps=1, learning_rate=1e-9, warmup=1, log_seconds=0)
    stage = replace(STAGES[0], schedule=schedule)
    torch.manual_seed(3)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    better = FastViTHD(small_encoder_config(image_size=192))
    better.save_pretrained(tmp_path / "better")
    shape = DecoderShape(layers=2, width=32, hidden=32, heads=4, kv_heads=2, vocabulary=300)
    train_model(
        photos, tmp_path / "first", encoder=tmp_path / "encoder", stages=[stage], shape=shape
    )
    train_model(
        photos,
        tmp_path / "second",
        encoder=tmp_path / "better",
        start=tmp_path / "first",
        stages=[stage],
    )
    first, second = load(tmp_path / "first"), load(tmp_path / "second")
    torch.testing.assert_close(
        second.model.lm_head.weight, first.model.lm_head.weight, rtol=0, atol=1e-2
    )
    pixels = torch.rand(1, 3, 192, 192)
    seen = second.model.model.vision_tower(pixels).last_hidden_state
    # Weights are saved in bfloat16.
    expected = better.eval()(pixels).last_hidden_state
    torch.testing.assert_close(
        seen, expected, rtol=0.05, atol=0.05 * float(expected.detach().std())
    )
    with pytest.raises(CheckpointError, match="needs an encoder, or a model"):
        train_model(photos, tmp_path / "third", stages=[stage])


def test_the_reward_is_for_what_people_say() -> None:
    photos = [
        CaptionedImage(Path("a"), ("A dog runs in the grass.", "A brown dog is running.")),
        CaptionedImage(Path("b"), ("Two men sit on a bench.", "Men on a bench.")),
        CaptionedImage(Path("c"), ("A girl swims.", "A girl in a pool.")),
    ]
    consensus = Consensus(photos)
    right = consensus.reward(0, "A dog runs in the grass.", ended=True)
    assert right > consensus.reward(0, "A dog runs in the grass.", ended=False)
    assert right > consensus.reward(0, "A dog runs.", ended=True) > 0
    assert consensus.reward(1, "A dog runs.", ended=True) < 0.1


def test_samples_are_set_against_the_others_of_their_photo() -> None:
    found = advantages(torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]))
    # Against the mean of the other two: -1.5, 0, 1.5.
    assert found[0].tolist() == pytest.approx([-float(found[0, 2]), 0.0, float(found[0, 2])])
    assert float(found[0, 2]) > 0
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert float(found.std()) == pytest.approx(1.0)


def test_sampled_sentences_are_the_models_own() -> None:
    vlm = small_vlm()
    torch.manual_seed(4)
    features = torch.randn(2, VISUAL_TOKENS, vlm.decoder.width, dtype=torch.float64)
    drawn = sample_sentences(vlm.model, vlm.tokenizer, SCENE_PROMPT, features)
    assert [len(dialogues) for dialogues in drawn] == [SAMPLES, SAMPLES]
    for dialogues, seen in zip(drawn, features, strict=True):
        for dialogue in dialogues:
            assert dialogue.features.equal(seen)
            reply = dialogue.labels >= 0
            assert dialogue.tokens[reply].equal(dialogue.labels[reply])
            ends = (dialogue.tokens[reply] == vlm.tokenizer.eos_token_id).tolist()
            assert not any(ends[:-1])
    # Sampled, not the best one five times.
    assert len({tuple(dialogue.tokens.tolist()) for dialogue in drawn[0]}) > 1


def test_gradient_checkpointing_learns_the_same(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    shape = DecoderShape(layers=2, width=32, hidden=32, heads=4, kv_heads=2, vocabulary=300)
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=1, log_seconds=0)
    curves, passes = [], []
    for again in (False, True):
        output = tmp_path / str(again)
        seen: list[str] = []
        hook = register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(type(module).__name__)
        )
        train_model(
            photos, output, encoder=tmp_path / "encoder", shape=shape,
            stages=[replace(STAGES[1], schedule=schedule)], gradient_checkpointing=again,
        )  # fmt: skip
        hook.remove()
        passes.append(seen.count("Qwen2Attention"))
        lines = (output / "together" / "log.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    # Each layer's attention is computed a second time on the way back.
    assert passes[1] == 2 * passes[0] > 0
