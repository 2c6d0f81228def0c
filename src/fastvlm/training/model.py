"""The whole model's lesson: to describe scenes exactly and photographs as people do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from fastvlm.data.captioned import CaptionedPhotograph, decode, read_flickr8k
from fastvlm.data.questions import HELD_OUT_SCENES
from fastvlm.embedded import DESCRIPTION_PROMPT, SCENE_PROMPT, SENTENCE_PROMPT
from fastvlm.scenes import describe, sample
from fastvlm.training.augmentation import random_views
from fastvlm.training.encoder import scene_pixels
from fastvlm.training.loop import Schedule, train
from fastvlm.training.tokenizer import IMAGE, learn_tokenizer
from fastvlm.vision.fastvithd import REDUCTION

IGNORED = -100
PROMPTS = {
    "scene": (SCENE_PROMPT, "Describe the scene.", "What is in the scene? Describe all of it."),
    "sentence": (SENTENCE_PROMPT, "Describe the picture.", "What is in this picture?"),
    "description": (
        DESCRIPTION_PROMPT,
        "Describe the picture in detail.",
        "What is in this picture? Write several sentences.",
    ),
}


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The decoder's size: a Qwen2 with tied embeddings."""

    layers: int = 20
    width: int = 192
    hidden: int = 576
    heads: int = 3
    kv_heads: int = 1
    vocabulary: int = 4096
    context: int = 1024


def new_model(
    encoder: Path, tokenizer: PreTrainedTokenizerFast, shape: DecoderShape
) -> FastVlmForConditionalGeneration:
    """Return a model in `transformers`' layout around a trained encoder, its decoder untrained."""
    vision = AutoModel.from_pretrained(encoder)
    text: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = FastVlmConfig(
        vision_config=vision.config.to_dict(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.config.image_size // REDUCTION) ** 2,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Residual branches start small in proportion to their number (as GPT-2's do), so that a deep
    # and narrow decoder learns from the first step.
    for layer in model.model.language_model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data /= math.sqrt(2 * shape.layers)
    return model


def corpus(photographs: Sequence[CaptionedPhotograph]) -> list[str]:
    """Return the texts that the tokenizer learns from."""
    captions = [caption for photograph in photographs for caption in photograph.captions]
    scenes = [describe(sample(seed)) for seed in range(1000)]
    return captions + scenes + [prompt for prompts in PROMPTS.values() for prompt in prompts]


class ModelLesson:
    """Teaches the whole model its replies by teacher forcing, in three kinds of dialogue."""

    def __init__(
        self,
        model: FastVlmForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        photographs: Sequence[CaptionedPhotograph],
        *,
        scenes_first: int = 0,
        scenes_a_step: int = 8,
        photographs_a_step: int = 10,
    ) -> None:
        # Evaluation statistics in the BatchNorms: a batch is small here, and the encoder has
        # learnt them in its own lesson.
        self.model = model.eval()
        self.module: nn.Module = model
        model.model.vision_tower.rate_scale = 0.3
        self.tokenizer = tokenizer
        self.photographs = photographs
        self.scenes_a_step, self.photographs_a_step = scenes_a_step, photographs_a_step
        self.scenes_first = scenes_first
        self.size = model.config.vision_config.image_size
        self.visual = (self.size // REDUCTION) ** 2
        self.pixels = decode(photographs, 224)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the mean cross-entropy of all reply tokens of one step, and of each kind."""
        # Looking at the place that a sentence names, and repeating what was said before, are learnt
        # from scenes, where they decide every word; photographs alone hardly teach them.
        first = step < self.scenes_first
        parts = self.scenes(2 * self.scenes_a_step if first else self.scenes_a_step)
        if not first:
            parts |= self.photos(self.photographs_a_step)
        losses = torch.cat(list(parts.values()))
        return losses.mean(), {kind: float(part.detach().mean()) for kind, part in parts.items()}

    def scenes(self, number: int) -> dict[str, Tensor]:
        """Return the losses of the exact descriptions of so many scenes."""
        scenes = [sample(random.randrange(HELD_OUT_SCENES)) for _ in range(number)]
        features = self.visual_tokens(scene_pixels(scenes, self.size))
        return {"scene": self.replies(features, "scene", [describe(scene) for scene in scenes])}

    def photos(self, number: int) -> dict[str, Tensor]:
        """Return the losses of so many photographs' captions: all of one, and a single one."""
        rows = torch.randint(len(self.photographs), (number,))
        captions = [self.photographs[row].captions for row in rows]
        several = [" ".join(random.sample(given, len(given))) for given in captions]
        single = [random.choice(given) for given in captions]
        features = self.visual_tokens(random_views(self.pixels[rows], self.size, smallest=0.7))
        return {
            "description": self.replies(features, "description", several),
            "sentence": self.replies(features, "sentence", single),
        }

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """Return the projected features: (pictures, visual tokens, d_model)."""
        pixels = pixels.to(memory_format=torch.channels_last)
        return self.model.model.get_image_features(pixels).pooler_output

    def replies(self, features: Tensor, kind: str, replies: Sequence[str]) -> Tensor:
        """Return the cross-entropy of every token of the replies, flat."""
        dialogues = [
            encode_dialogue(self.tokenizer, random.choice(PROMPTS[kind]), reply, self.visual)
            for reply in replies
        ]
        tokens = pad_sequence([d[0] for d in dialogues], batch_first=True)
        labels = pad_sequence([d[1] for d in dialogues], batch_first=True, padding_value=IGNORED)
        return token_losses(self.model, tokens, labels, features)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerFast, prompt: str, reply: str, visual: int
) -> tuple[Tensor, Tensor]:
    """Return one dialogue's tokens, the picture first, and the labels of its reply."""
    chat = [{"role": "user", "content": f"{IMAGE * visual}{prompt}"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before = tokenizer.encode(text)
    after = [*tokenizer.encode(reply), tokenizer.eos_token_id]
    tokens = torch.tensor(before + after)
    return tokens, torch.tensor([IGNORED] * len(before) + after)


def token_losses(
    model: FastVlmForConditionalGeneration, tokens: Tensor, labels: Tensor, features: Tensor
) -> Tensor:
    """Return the cross-entropy at every labelled position, flat.

    Args:
        model: The model.
        tokens: (batch, length), padded on the right.
        labels: (batch, length), `IGNORED` where nothing is to be learnt.
        features: (batch, visual tokens, d_model).
    """
    decoder = model.model.language_model
    embeddings = decoder.embed_tokens(tokens)
    pictures = tokens == model.config.image_token_id
    embeddings = embeddings.masked_scatter(pictures[..., None], features)
    # Padding stands on the right, so the causal mask alone keeps it out of sight.
    states = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    return F.cross_entropy(model.lm_head(states[learnt]), targets[learnt], reduction="none")


def train_model(
    encoder: Path,
    photographs: Path,
    output: Path,
    schedule: Schedule,
    shape: DecoderShape | None = None,
) -> None:
    """Train a model around a trained encoder and save it, fused and in bfloat16, as `output`.

    Args:
        encoder: What `train_encoder` saved.
        photographs: A folder in Flickr8k's layout.
        output: The directory of the checkpoint while it runs, and of the model in the end.
        schedule: Length and learning rate of the run.
        shape: The decoder's size.
    """
    shape = shape or DecoderShape()
    torch.manual_seed(schedule.seed)
    pictures = read_flickr8k(photographs, "train")
    tokenizer = learn_tokenizer(corpus(pictures), shape.vocabulary)
    model = new_model(encoder, tokenizer, shape)
    train(ModelLesson(model, tokenizer, pictures), schedule, output)
    model.model.vision_tower.fuse()
    model.config.vision_config.form = "fused"
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
