"""The whole model's task: to describe scenes exactly and photos as people do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import FastVlmForConditionalGeneration, PreTrainedTokenizerFast

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.captioned import CaptionedImage, decode, read_flickr8k, typical_first
from fastvlm.functional.digests import digest, digest_of_weights
from fastvlm.functional.errors import CheckpointError
from fastvlm.functional.placement import moved
from fastvlm.metrics.captions import CiderD
from fastvlm.training.assembly import read_encoder
from fastvlm.training.consensus import CaptionedRow, SelfCritic, compared
from fastvlm.training.instruction import SupervisedTask, save_tuned
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.rollouts import Rollouts
from fastvlm.training.rows import FastViTHDRows, TrainingRow
from fastvlm.training.task import Losses
from fastvlm.vision.configuration import FastViTHDConfig
from fastvlm_example.scenes import describe, sample
from fastvlm_example.tokenizer import learn_tokenizer
from recipe.architecture import DecoderShape, new_model, use_encoder
from recipe.conversations import DecodedPhotos, Said, conversation, draw_photos, draw_scenes
from recipe.repetition import MAX_NEW_TOKENS, repeated, unlikelihood
from recipe.stages import STAGES, Stage
from recipe.wordings import all_forms, wording


def corpus(photos: Sequence[CaptionedImage]) -> list[str]:
    """Return the texts that the tokenizer learns from."""
    captions = [caption for photo in photos for caption in photo.captions]
    scenes = [describe(sample(seed)) for seed in range(1000)]
    return captions + scenes + all_forms()


class ModelTask(SupervisedTask):
    """Teaches projector and decoder what the steps of a stage show.

    Args:
        model: The model; its encoder learns only in a stage that tunes it.
        tokenizer: Its tokenizer.
        photos: Photos with captions.
        stage: The stage.
    """

    def __init__(
        self,
        model: FastVlmForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        photos: DecodedPhotos,
        stage: Stage,
    ) -> None:
        moved(model, this_process().device)
        model.model.vision_tower.requires_grad_(stage.tunes_encoder)
        self.size = cast(FastViTHDConfig, model.config.vision_config).image_size
        shown = {k: v for k, v in asdict(stage).items() if k not in ("name", "schedule")}
        plan = {
            **shown,
            "model": digest_of_weights(model),
            "photos": digest([[p.path, p.captions] for p in photos.photos]),
        }
        super().__init__(model, FastViTHDRows(model, tokenizer, self.size), plan)
        self.tokenizer, self.photos, self.stage = tokenizer, photos, stage
        self.critic: SelfCritic | None = None
        if stage.sampled or stage.described:
            self.whole = "what the model says of its own is scored once a step"
        if stage.sampled:
            scorer = CiderD([compared(photo.captions) for photo in photos.photos])
            self.critic = SelfCritic(model, self.rows, scorer)

    def draw(self, step: int) -> list[TrainingRow]:
        """Return the rows of a step."""
        stage = self.stage
        shown = draw_scenes(stage.scenes, self.size, stage.shortened)
        shown += draw_photos(self.photos, stage.photos, self.size)
        rows = [replace(row, kind=one.name) for one in shown for row in self.rows.rows(one)]
        # Rows of like length share a slice, so that little is computed for padding.
        return sorted(rows, key=lambda row: len(row.labels))

    def loss(self, examples: Sequence[TrainingRow]) -> Losses:
        """Return the loss of some rows, and what a stage has of the model's own replies."""
        taught = super().loss(examples)
        total, report = taught.total, dict(taught.report)
        if self.critic is not None:
            loss, rewards = self.critic.loss(self.shown(self.stage.sampled, "sentence"))
            total = total + taught.weight * loss
            report["reward"] = (float(rewards.sum()), float(rewards.numel()))
        if self.stage.described:
            loss, again = self.repetition(self.shown(self.stage.described, "description"))
            total = total + taught.weight * loss
            report["repeated"] = (float(again.sum()), float(again.numel()))
        return Losses(total, taught.weight, report)

    def shown(self, number: int, kind: str) -> list[CaptionedRow]:
        """Return some photos with a request of a kind in front, and their captions."""
        found = []
        for photo, image in self.photos.draw(number, self.size):
            captions = self.photos.photos[photo].captions
            said = Said(kind, wording(kind), captions[0])
            [written], images = self.rows.write_all(conversation(said, image))
            prompt = torch.tensor(written.token_ids[: written.prompt_length])
            found.append(
                CaptionedRow(prompt, images["pixel_values"], compared(captions), taught=[])
            )
        return found

    def repetition(self, examples: Sequence[CaptionedRow]) -> tuple[Tensor, Tensor]:
        """Return the unlikelihood of what greedy descriptions repeat, a mean over all their tokens.

        The second is whether each of the tokens repeats: (tokens,).
        """
        shown = [one.prompt for one in examples], [one.pixels for one in examples]
        rollouts = Rollouts(self.model, self.rows)
        replies = rollouts.decode(*shown, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        losses = rollouts.losses(*shown, replies)
        again = torch.tensor([said for [reply] in replies for said in repeated(reply)])
        return (unlikelihood(losses) * again.to(losses.device)).mean(), again


def train_model(
    photos: Path,
    output: Path,
    *,
    encoder: Path | None = None,
    start: Path | None = None,
    stages: Sequence[Stage] = STAGES,
    shape: DecoderShape | None = None,
    gradient_checkpointing: bool = False,
) -> None:
    """Train a model through some stages and save it, fused and in bfloat16, as `output`.

    Each stage keeps its checkpoint and its log in a folder of its own under `output`; a run that
    was stopped goes on in the stage where it stopped.

    Args:
        photos: A folder in Flickr8k's layout.
        output: The directory of the checkpoints while it runs, and of the model in the end.
        encoder: What `train_encoder` saved.
        start: A model to go on from; None for a new one around the encoder. With an encoder too,
            the model's own is replaced by it.
        stages: The stages, in their order.
        shape: A new decoder's size.
        gradient_checkpointing: Whether the decoder's layers are computed again on the way back,
            which needs less memory and more time.

    Raises:
        CheckpointError: There is neither an encoder nor a model, or they can't be read.
    """
    torch.manual_seed(stages[0].schedule.seed)
    vision = None if encoder is None else read_encoder(encoder)
    images = typical_first(read_flickr8k(photos, "train"))
    if start is not None:
        model, tokenizer = read_model(start)
        use_encoder(model, vision or model.model.vision_tower)
    elif vision is not None:
        shape = shape or DecoderShape()
        tokenizer = learn_tokenizer(corpus(images), shape.vocabulary)
        model = new_model(vision, tokenizer, shape)
    else:
        raise CheckpointError("A model needs an encoder, or a model to go on from.")
    if gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable()
    shown = DecodedPhotos(images, decode(images, 224))
    for stage in stages:
        train(ModelTask(model, tokenizer, shown, stage), stage.schedule, output / stage.name)
    save_tuned(model, tokenizer, output)


def read_model(path: Path) -> tuple[FastVlmForConditionalGeneration, PreTrainedTokenizerFast]:
    """Read a model to go on from, in float32.

    Raises:
        CheckpointError: There is none, it can't be read, or it is of another kind.
    """
    model, tokenizer = load_checkpoint(path, torch.float32, "cpu")
    if not isinstance(model, FastVlmForConditionalGeneration):
        raise CheckpointError(f"{path} is a {type(model).__name__}, which can't be trained here.")
    return model, cast(PreTrainedTokenizerFast, tokenizer)
