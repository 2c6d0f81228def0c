"""The example model's training: what a step shows, what it costs, and that stages make a model."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from fastvlm.data.captioned import decode, read_flickr8k
from fastvlm.functional.errors import CheckpointError
from fastvlm.training.consensus import SAMPLES, advantages, compared
from fastvlm.training.optimisation import seed_step
from fastvlm.training.rollouts import Rollouts
from fastvlm.training.rows import IGNORED, TrainingRow
from fastvlm.training.schedule import Schedule
from fastvlm.vision import FastViTHD
from fastvlm.vision.images import prepare
from fastvlm.vlm import VisionLanguageModel, load
from fastvlm_example import HELD_OUT_SCENES, SCENE_PROMPT
from fastvlm_example.scenes import describe, render, sample
from recipe import conversations, repetition
from recipe.architecture import DecoderShape
from recipe.conversations import DecodedPhotos, described
from recipe.descriptions import sentences_of
from recipe.model import ModelTask, train_model
from recipe.stages import STAGES, Stage
from recipe.wordings import CANONICAL, wording
from tests.models import IMAGE_SIZE, small_encoder_config, small_vlm

CAPTIONS = ("A dog runs .", "A brown dog runs fast .", "The sun")
TIDY = ("A dog runs.", "A brown dog runs fast.", "The sun.")
SHAPE = DecoderShape(layers=2, width=32, hidden=32, heads=4, kv_heads=2, vocabulary=300)


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


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def task_of(stage: Stage, photos: Path) -> ModelTask:
    vlm = small_vlm()
    # The tokenizer has seen no captions.
    vlm.model.config.text_config.max_position_embeddings = 512
    found = read_flickr8k(photos, "train")
    shown = DecodedPhotos(found, decode(found, IMAGE_SIZE))
    return ModelTask(vlm.model, vlm.tokenizer, shown, stage)


def naive_losses(task: ModelTask, row: TrainingRow) -> Tensor:
    """The cross-entropy of each token of a row's reply, from the model's own logits."""
    tokens, pixels = row.inputs["input_ids"], row.inputs["pixel_values"]
    logits = task.model(input_ids=tokens[None], pixel_values=pixels.double()).logits[0, :-1]
    reply = row.labels[1:]
    return -logits.log_softmax(-1)[range(len(reply)), reply][reply != IGNORED]


def test_a_step_shows_scenes_and_photos_as_a_prompt_shows_them(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        conversations, "wording", lambda kind: asked.append(wording(kind)) or asked[-1]
    )
    # Each scene is asked about in the words of scenes.
    monkeypatch.setattr(conversations, "SCENE_REQUESTS", {"scene": 1})
    task = task_of(replace(STAGES[1], scenes=2, photos=2), photos)
    seed_step(0, 0)
    scenes = [sample(random.randrange(HELD_OUT_SCENES)) for _ in range(2)]
    seed_step(0, 0)
    rows = task.draw(0)
    kinds = Counter(row.kind for row in rows)
    assert kinds == {"scene": 2, "description": 2, "sentence": 2}
    assert [len(row.labels) for row in rows] == sorted(len(row.labels) for row in rows)
    vlm = VisionLanguageModel(task.model, task.tokenizer)
    for row in rows:
        tokens, learnt = row.inputs["input_ids"].tolist(), row.labels != IGNORED
        prompts = [vlm.tokens(prompt, images=1) for prompt in asked]
        assert tokens[: int((~learnt).sum())] in prompts
        assert row.labels[learnt].tolist() == tokens[-int(learnt.sum()) :]
        reply = task.tokenizer.decode(row.labels[learnt])
        text = reply.removesuffix("<|end|>")
        assert text != reply
        if row.kind == "scene":
            [scene] = [scene for scene in scenes if describe(scene) == text]
            assert row.inputs["pixel_values"].equal(prepare(render(scene, IMAGE_SIZE), IMAGE_SIZE))
        else:
            said = sentences_of(text)
            assert {*said} <= {*TIDY}
            # The two about the dog are not said together.
            assert len({*said}) == len(said) == {"sentence": 1, "description": 2}[row.kind]
            assert not {*TIDY[:2]} <= {*said}


def test_a_shortened_description_ends_with_the_last_thing() -> None:
    scene = sample(1)
    whole = describe(scene)
    assert described(scene, 0.0) == whole
    short = described(scene, 1.0)
    assert whole.startswith(short)
    assert short != whole
    assert short.count(".") == 1 + len(scene.things)


def test_a_steps_loss_is_the_mean_of_its_tokens(photos: Path) -> None:
    task = task_of(replace(STAGES[1], scenes=2, photos=2), photos)
    seed_step(0, 0)
    rows = task.draw(0)
    found = task.loss(rows)
    alone = [naive_losses(task, row) for row in rows]
    assert found.weight == sum(map(len, alone))
    torch.testing.assert_close(found.total, torch.cat(alone).sum(), rtol=1e-6, atol=0)
    for kind in CANONICAL:
        parts = [part for row, part in zip(rows, alone, strict=True) if row.kind == kind]
        expected = (float(torch.cat(parts).detach().sum()), sum(map(len, parts)))
        assert found.report[kind] == pytest.approx(expected, rel=1e-6)


def test_sampled_sentences_count_by_their_advantage(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "recipe.model.wording", lambda kind: asked.append(wording(kind)) or asked[-1]
    )
    task = task_of(replace(STAGES[2], scenes=1, photos=0, sampled=2, described=0), photos)
    assert task.critic is not None
    seed_step(0, 0)
    examples = task.shown(2, "sentence")
    vlm = VisionLanguageModel(task.model, task.tokenizer)
    # What is before a reply is what serving asks.
    prompts = [one.prompt.tolist() for one in examples]
    assert prompts == [vlm.tokens(text, images=1) for text in asked]
    assert [one.captions for one in examples] == 2 * [compared(TIDY)]
    # A small model says nothing that people say.
    rewards = iter(range(2 * SAMPLES))
    task.critic.reward = lambda *_: float(next(rewards) ** 2)  # type: ignore[method-assign]
    replies: list[Any] = []
    decode = task.critic.rollouts.decode

    def kept(*shown: Any, **settings: Any) -> Any:
        replies.extend(decode(*shown, **settings))
        return replies

    task.critic.rollouts.decode = kept  # type: ignore[method-assign]
    loss, found = task.critic.loss(examples)
    assert float(found.mean()) == pytest.approx(28.5)
    gains = iter(advantages(torch.arange(10.0).square().view(2, SAMPLES)).flatten())
    alone = [
        next(gains) * task.critic.rollouts.losses([one.prompt], [one.pixels], [[reply]])
        for one, said in zip(examples, replies, strict=True)
        for reply in said
    ]
    torch.testing.assert_close(loss, torch.cat(alone).mean(), rtol=1e-5, atol=1e-6)


def test_tokens_that_end_an_n_gram_said_before_are_repeated() -> None:
    said = [1, 2, 3, 4, 9, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    # 1 2 3 4 comes back at place 8, 2 3 4 5 at the end.
    assert [place for place, again in enumerate(repetition.repeated(said)) if again] == [8, 13]
    assert not any(repetition.repeated([1, 2, 3]))


def test_the_unlikelihood_of_a_token_is_that_of_all_others() -> None:
    probabilities = torch.tensor([0.9, 0.5, 1e-9], dtype=torch.float64, requires_grad=True)
    found = repetition.unlikelihood(-probabilities.log())
    torch.testing.assert_close(found, -torch.log1p(-probabilities))
    # A certain token has a finite loss.
    assert float(repetition.unlikelihood(torch.zeros(1))) == pytest.approx(13.8, abs=0.1)


def test_what_descriptions_repeat_becomes_unlikelier(photos: Path) -> None:
    task = task_of(replace(STAGES[2], scenes=1, photos=0, sampled=0, described=2), photos)
    seed_step(0, 0)
    examples = task.shown(2, "description")
    # Descriptions that say the same words twice, which a small model doesn't by itself.
    said = [*range(10, 18), *range(10, 18)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "decode", lambda *_, **__: [[said], [said]])
        loss, again = task.repetition(examples)
    assert again.tolist() == 2 * [place >= 8 + repetition.NGRAM - 1 for place in range(16)]
    rollouts = Rollouts(task.model, task.rows)
    losses = rollouts.losses(
        [one.prompt for one in examples], [one.pixels for one in examples], [[said], [said]]
    )
    expected = (-torch.log1p(-torch.exp(-losses)) * again).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_stages_make_a_model_that_loads_and_replies(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=1, log_seconds=0)
    stages = [replace(stage, schedule=schedule) for stage in STAGES]
    train_model(
        photos, tmp_path / "model", encoder=tmp_path / "encoder", stages=stages, shape=SHAPE
    )
    reports = {
        stage.name: json.loads(
            (tmp_path / "model" / stage.name / "log.jsonl").read_text().splitlines()[-1]
        )
        for stage in stages
    }
    assert {"scene", "sentence", "description"} <= reports["together"].keys()
    assert reports["consensus"]["reward"] >= 0
    assert 0 <= reports["consensus"]["repeated"] <= 1
    vlm = load(tmp_path / "model")
    # Nine visual tokens, one for each place of a scene.
    assert vlm.model.config.image_seq_length == 9
    assert len(vlm.generate(SCENE_PROMPT, render(sample(3), 192), max_new_tokens=5).token_ids) == 5


@pytest.mark.parametrize("tuned", [False, True])
def test_the_encoder_stays_as_it_is_unless_it_is_tuned(
    tmp_path: Path, photos: Path, tuned: bool
) -> None:
    torch.manual_seed(3)
    encoder = FastViTHD(small_encoder_config(image_size=192))
    encoder.save_pretrained(tmp_path / "encoder")
    schedule = Schedule(steps=2, learning_rate=1e-2, warmup=0)
    stage = replace(STAGES[1], schedule=schedule, tunes_encoder=tuned)
    train_model(
        photos, tmp_path / "model", encoder=tmp_path / "encoder", stages=[stage], shape=SHAPE
    )
    found = weights(tmp_path / "model")
    kept = {
        name: found[f"model.vision_tower.{name}"].equal(weight.to(torch.bfloat16))
        for name, weight in encoder.fuse().state_dict().items()
    }
    assert all(kept.values()) != tuned
    assert not tuned or sum(kept.values()) < len(kept) / 2


def test_a_model_goes_on_from_another_with_a_better_encoder(tmp_path: Path, photos: Path) -> None:
    schedule = Schedule(steps=1, learning_rate=1e-9, warmup=1, log_seconds=0)
    stage = replace(STAGES[0], schedule=schedule)
    torch.manual_seed(3)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    better = FastViTHD(small_encoder_config(image_size=192))
    better.save_pretrained(tmp_path / "better")
    train_model(
        photos, tmp_path / "first", encoder=tmp_path / "encoder", stages=[stage], shape=SHAPE
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


def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    schedule = Schedule(steps=3, learning_rate=1e-3, warmup=1, checkpoint_seconds=0)
    stages = [replace(stage, schedule=schedule) for stage in (STAGES[0], STAGES[2])]

    def go(output: Path) -> None:
        train_model(photos, output, encoder=tmp_path / "encoder", stages=stages, shape=SHAPE)

    go(tmp_path / "whole")
    original = ModelTask.draw

    def stop(self: ModelTask, step: int) -> list[TrainingRow]:
        if self.stage.sampled and step == 2:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(ModelTask, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped")
    monkeypatch.undo()
    go(tmp_path / "stopped")
    logged = (tmp_path / "stopped" / "consensus" / "log.jsonl").read_text().splitlines()
    assert json.loads(logged[-1])["step"] == 3
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    for name, weight in whole.items():
        assert stopped[name].equal(weight), name


def test_scenes_are_learnt(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    schedule = Schedule(steps=40, learning_rate=2e-2, warmup=2, log_seconds=0)
    stage = replace(STAGES[0], schedule=schedule, scenes=4)
    output = tmp_path / "model"
    train_model(photos, output, encoder=tmp_path / "encoder", stages=[stage], shape=SHAPE)
    log = [json.loads(line) for line in (output / "scenes" / "log.jsonl").read_text().splitlines()]
    assert log[0]["scene"] == pytest.approx(log[0]["loss"])
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]


def test_gradient_checkpointing_learns_the_same(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(2)
    FastViTHD(small_encoder_config(image_size=192)).save_pretrained(tmp_path / "encoder")
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=1, log_seconds=0)
    curves, passes = [], []
    for again in (False, True):
        output = tmp_path / str(again)
        seen: list[str] = []
        hook = register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(type(module).__name__)
        )
        train_model(
            photos, output, encoder=tmp_path / "encoder", shape=SHAPE,
            stages=[replace(STAGES[1], schedule=schedule)], gradient_checkpointing=again,
        )  # fmt: skip
        hook.remove()
        passes.append(seen.count("Qwen2Attention"))
        lines = (output / "together" / "log.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    # Each layer's attention is computed a second time on the way back.
    assert passes[1] == 2 * passes[0] > 0
