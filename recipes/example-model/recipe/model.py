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
from fastvlm.training.assembly import read_encoder
from fastvlm.training.consensus import advantages
from fastvlm.training.instruction import SupervisedTask, save_tuned
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.reply_scores import score_replies
from fastvlm.training.rows import IGNORED, FastViTHDRows, TrainingRow
from fastvlm.training.task import Losses
from fastvlm.vision.configuration import FastViTHDConfig
from fastvlm_example.scenes import describe, sample
from fastvlm_example.tokenizer import learn_tokenizer
from recipe.architecture import DecoderShape, new_model, use_encoder
from recipe.consensus import SAMPLES, Consensus, sample_sentences
from recipe.conversations import DecodedPhotos, draw_photos, draw_scenes
from recipe.growth import AS_IT_IS, Size, grown
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
        self.consensus: Consensus | None = None
        if stage.sampled:
            self.whole = "the rewards of a step are set against one another"
            self.consensus = Consensus(photos.photos)

    def draw(self, step: int) -> list[TrainingRow]:
        """Return the rows of a step."""
        stage = self.stage
        shown = draw_scenes(stage.scenes, self.size, stage.shortened)
        shown += draw_photos(self.photos, stage.photos, self.size)
        rows = [replace(row, kind=one.name) for one in shown for row in self.rows.rows(one)]
        # Rows of like length share a slice, so that little is computed for padding.
        return sorted(rows, key=lambda row: len(row.labels))

    def loss(self, examples: Sequence[TrainingRow]) -> Losses:
        """Return the loss of some rows and, in a stage with a consensus, of sampled sentences."""
        taught = super().loss(examples)
        if self.consensus is None:
            return taught
        sampled, reward = self.sampled(self.consensus)
        total = taught.total + taught.weight * sampled
        return Losses(total, taught.weight, {**taught.report, "reward": (reward, 1.0)})

    def sampled(self, consensus: Consensus) -> tuple[Tensor, float]:
        """Return the self-critical loss of sentences sampled of photos; their mean reward."""
        numbers, images = zip(*self.photos.draw(self.stage.sampled, self.size), strict=True)
        rows = sample_sentences(self.model, self.tokenizer, wording("sentence"), images)
        rewards = [
            self.reward(consensus, numbers[place // SAMPLES], row) for place, row in enumerate(rows)
        ]
        gains = advantages(torch.tensor(rewards).view(-1, SAMPLES)).flatten().tolist()
        scores = score_replies(self.model, self.rows, rows)
        weighted = [gain * scored.losses for gain, scored in zip(gains, scores, strict=True)]
        return torch.cat(weighted).mean(), sum(rewards) / len(rewards)

    def reward(self, consensus: Consensus, number: int, row: TrainingRow) -> float:
        """Return the reward of a sentence that was sampled of a photo, given by its index."""
        reply = row.labels[row.labels != IGNORED].tolist()
        sentence = cast(str, self.tokenizer.decode(reply, skip_special_tokens=True))
        return consensus.reward(number, sentence, ended=reply[-1] == self.tokenizer.eos_token_id)


def train_model(
    photos: Path,
    output: Path,
    *,
    encoder: Path | None = None,
    start: Path | None = None,
    stages: Sequence[Stage] = STAGES,
    shape: DecoderShape | None = None,
    size: Size = AS_IT_IS,
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
        size: How large the decoder of `start` is made first.
        gradient_checkpointing: Whether the decoder's layers are computed again on the way back,
            which needs less memory and more time.

    Raises:
        CheckpointError: There is neither an encoder nor a model, or they can't be read.
        InputError: The decoder can't be grown to that size.
    """
    torch.manual_seed(stages[0].schedule.seed)
    vision = None if encoder is None else read_encoder(encoder)
    images = typical_first(read_flickr8k(photos, "train"))
    if start is not None:
        model, tokenizer = read_model(start)
        model = grown(model, size)
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
