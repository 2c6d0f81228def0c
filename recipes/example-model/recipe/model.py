"""The whole model's task: to describe scenes exactly and photos as people do."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import FastVlmForConditionalGeneration, PreTrainedTokenizerFast

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.captioned import CaptionedImage, decode, read_flickr8k, typical_first
from fastvlm.functional.digests import digest, digest_of_weights
from fastvlm.functional.errors import CheckpointError
from fastvlm.functional.files import written_into
from fastvlm.functional.placement import moved
from fastvlm.training.assembly import read_encoder
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.rows import IGNORED
from fastvlm.training.sharding import whole_state
from fastvlm.training.task import ExampleStream, Losses
from fastvlm.vision.configuration import REDUCTION, FastViTHDConfig
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import Scene, describe, sample
from fastvlm_example.tokenizer import learn_tokenizer
from recipe.architecture import DecoderShape, new_model, use_encoder
from recipe.augmentation import random_crops
from recipe.consensus import Consensus, advantages, sample_sentences
from recipe.dialogues import PROMPTS, Dialogue, encode_dialogue, token_losses
from recipe.encoder import scene_pixels
from recipe.growth import AS_IT_IS, Size, grown
from recipe.stages import STAGES, Stage

DIALOGUES_A_PASS = 11
"""Dialogues in one pass of the decoder; a step has up to three passes."""


def corpus(photos: Sequence[CaptionedImage]) -> list[str]:
    """Return the texts that the tokenizer learns from."""
    captions = [caption for photo in photos for caption in photo.captions]
    scenes = [describe(sample(seed)) for seed in range(1000)]
    return captions + scenes + [prompt for prompts in PROMPTS.values() for prompt in prompts]


@dataclass(frozen=True, slots=True)
class Shown:
    """An image, and what is to be said of it.

    Args:
        pixels: (3, height, width) in [0, 1].
        said: Dialogues: a kind, the tokens, and the reply's labels.
    """

    pixels: Tensor
    said: list[tuple[str, Tensor, Tensor]]


class ModelTask:
    """Teaches projector and decoder their replies: what one step of a stage shows.

    Args:
        model: The model, its encoder frozen.
        tokenizer: Its tokenizer.
        photos: Photos with captions, the most typical caption first.
        pixels: The photos as (photos, 3, height, width), uint8.
        stage: The stage.
    """

    def __init__(
        self,
        model: FastVlmForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        photos: Sequence[CaptionedImage],
        pixels: Tensor,
        stage: Stage,
    ) -> None:
        self.device = this_process().device
        self.model = moved(model, self.device).eval()
        # It has no dropout; gradient checkpointing asks for this mode.
        self.model.model.language_model.train()
        self.module: nn.Module = model
        self.unit = "tokens"
        shown = {k: v for k, v in asdict(stage).items() if k not in ("name", "schedule")}
        self.plan: Mapping[str, Any] = {
            **shown,
            "model": digest_of_weights(model),
            "photos": digest([[p.path, p.captions] for p in photos]),
        }
        self.source: ExampleStream | None = None
        self.whole: str | None = None
        if stage.sampled:
            self.whole = "the rewards of a step are set against one another"
        self.tokenizer = tokenizer
        self.photos, self.pixels = photos, pixels
        self.stage = stage
        self.size = cast(FastViTHDConfig, model.config.vision_config).image_size
        self.visual = (self.size // REDUCTION) ** 2
        self.consensus = Consensus(photos) if stage.sampled else None

    def draw(self, step: int) -> list[Shown]:
        """Return the images of a step, with what is to be said of them."""
        return self.draw_scenes(self.stage.scenes) + self.draw_photos(self.stage.photos)

    def loss(self, examples: Sequence[Shown]) -> Losses:
        """Return the loss of some images' replies; reported is the mean of each kind."""
        losses: dict[str, list[Tensor]] = {}
        for kind, part in self.passes(self.dialogues(examples)):
            losses.setdefault(kind, []).append(part)
        kinds = {kind: torch.cat(parts) for kind, parts in sorted(losses.items())}
        total = torch.cat(list(kinds.values()))
        report = {kind: (float(part.detach().sum()), len(part)) for kind, part in kinds.items()}
        if self.consensus is None:
            return Losses(total.sum(), len(total), report)
        sampled, reward = self.sampled(self.consensus, self.stage.sampled)
        return Losses(
            total.sum() + len(total) * sampled, len(total), {**report, "reward": (reward, 1.0)}
        )

    def passes(self, dialogues: list[Dialogue]) -> Iterator[tuple[str, Tensor]]:
        """Yield each dialogue's kind and the losses of its reply's tokens."""
        # Dialogues of like length share a pass, so that little is computed for padding.
        dialogues.sort(key=lambda dialogue: len(dialogue.tokens))
        for start in range(0, len(dialogues), DIALOGUES_A_PASS):
            passed = dialogues[start : start + DIALOGUES_A_PASS]
            for dialogue, part in zip(passed, token_losses(self.model, passed), strict=True):
                yield dialogue.kind, part

    def dialogues(self, examples: Sequence[Shown]) -> list[Dialogue]:
        """Return the dialogues about some images, with the images' visual tokens."""
        features = self.visual_tokens(torch.stack([shown.pixels for shown in examples]))
        return [
            Dialogue(kind, tokens.to(self.device), labels.to(self.device), seen)
            for shown, seen in zip(examples, features, strict=True)
            for kind, tokens, labels in shown.said
        ]

    def sampled(self, consensus: Consensus, number: int) -> tuple[Tensor, float]:
        """Return the self-critical loss of sentences sampled of photos; their mean reward."""
        rows = torch.randint(len(self.photos), (number,))
        features = self.visual_tokens(random_crops(self.pixels[rows], self.size, smallest=0.7))
        prompt = random.choice(PROMPTS["sentence"])
        drawn = sample_sentences(self.model, self.tokenizer, prompt, features)
        rewards = torch.tensor(
            [
                [self.reward(consensus, row, dialogue) for dialogue in dialogues]
                for row, dialogues in zip(rows.tolist(), drawn, strict=True)
            ]
        )
        dialogues = [dialogue for of_one in drawn for dialogue in of_one]
        losses = token_losses(self.model, dialogues)
        better = advantages(rewards).flatten().tolist()
        weighted = [gain * part for gain, part in zip(better, losses, strict=True)]
        return torch.cat(weighted).mean(), float(rewards.mean())

    def reward(self, consensus: Consensus, row: int, dialogue: Dialogue) -> float:
        """Return the reward of a sampled sentence about a photo."""
        reply = dialogue.tokens[dialogue.labels != IGNORED].tolist()
        sentence = cast(str, self.tokenizer.decode(reply, skip_special_tokens=True))
        return consensus.reward(row, sentence, ended=reply[-1] == self.tokenizer.eos_token_id)

    def draw_scenes(self, number: int) -> list[Shown]:
        """Return so many scenes with their exact descriptions."""
        scenes = [sample(random.randrange(HELD_OUT_SCENES)) for _ in range(number)]
        return [
            Shown(pixels, [self.said("scene", self.described(scene))])
            for scene, pixels in zip(scenes, scene_pixels(scenes, self.size), strict=True)
        ]

    def described(self, scene: Scene) -> str:
        """Return a scene's description, or now and then its beginning."""
        text = describe(scene)
        if random.random() < self.stage.shortened:
            return ".".join(text.split(".")[: 1 + len(scene.things)]) + "."
        return text

    def draw_photos(self, number: int) -> list[Shown]:
        """Return so many photos, each with all of its captions and with one of the best."""
        if not number:
            return []
        rows = torch.randint(len(self.photos), (number,))
        crops = random_crops(self.pixels[rows], self.size, smallest=0.7)
        shown = []
        for row, pixels in zip(rows.tolist(), crops, strict=True):
            captions = self.photos[row].captions
            several = self.said("description", " ".join(captions))
            # The captions that agree most with the others teach what most people would say.
            shown.append(
                Shown(pixels, [several, self.said("sentence", random.choice(captions[:3]))])
            )
        return shown

    def said(self, kind: str, reply: str) -> tuple[str, Tensor, Tensor]:
        """Return a kind, and the tokens and labels of one of its prompts with a reply."""
        prompt = random.choice(PROMPTS[kind])
        return (kind, *encode_dialogue(self.tokenizer, prompt, reply, self.visual))

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """Return the projected features: (images, visual tokens, d_model)."""
        tower, project = self.model.model.vision_tower, self.model.model.multi_modal_projector
        with torch.no_grad():
            states = tower(pixels.to(self.device)).last_hidden_state
        return project(states.flatten(2).transpose(1, 2))


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
    pixels = decode(images, 224)
    for stage in stages:
        task = ModelTask(model, tokenizer, images, pixels, stage)
        train(task, stage.schedule, output / stage.name)
    save_model(model, tokenizer, output)


def read_model(path: Path) -> tuple[FastVlmForConditionalGeneration, PreTrainedTokenizerFast]:
    """Read a model to go on from, in float32.

    Raises:
        CheckpointError: There is none, it can't be read, or it is of another kind.
    """
    model, tokenizer = load_checkpoint(path, torch.float32, "cpu")
    if not isinstance(model, FastVlmForConditionalGeneration):
        raise CheckpointError(f"{path} is a {type(model).__name__}, which can't be trained here.")
    return model, cast(PreTrainedTokenizerFast, tokenizer)


def save_model(
    model: FastVlmForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Save a model in bfloat16; every process calls this, and process 0 writes."""
    state = whole_state(moved(model, torch.bfloat16))
    if this_process().is_main_process:
        with written_into(output, last="config.json") as beside:
            tokenizer.save_pretrained(beside)
            model.save_pretrained(beside, state_dict=state)
