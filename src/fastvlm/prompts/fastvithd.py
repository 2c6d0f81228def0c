"""Prompts of models around a FastViTHD encoder, whose images are prepared here."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.messages import Dialogue, Message, TokenPrompt, tools_of
from fastvlm.language import DecoderInputs, SplitDecoder
from fastvlm.prompts.features import ImageFeatureCache, digest
from fastvlm.prompts.messages import (
    IMAGE_PART_KEYS,
    checked_tokens,
    dialogue,
    images_of,
    templated,
)
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.images import ImageOptions, prepare

ENCODED_TOGETHER = 8
"""Prompts whose images are encoded together. On the small encoder an image of 192 px takes 14.6 ms
alone, 6.8 beside three others, 5.4 beside seven and 4.9 beside fifteen (one core of a Xeon)."""
PIXELS_TOGETHER = 2**20
"""The most pixels of a pass, unless one image has more: those of a 1024 px image, which gain
nothing from company and take much memory."""


@dataclass(frozen=True, slots=True)
class FastViTHDInputs:
    """Prepares a model's inputs without the model; it can be pickled.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        name: The model's name, for error messages.
        image_token: The placeholder of visual tokens.
        image_size: Side in pixels of the images that the model was made for.
        vocabulary_size: The number of tokens that the model knows.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    image_token: int
    image_size: int
    vocabulary_size: int

    def tokens(self, messages: Sequence[Message], visual: Sequence[int] | None = None) -> list[int]:
        """Return a dialogue's tokens, with a placeholder for every visual token.

        Args:
            messages: The dialogue; the contents of its images don't matter.
            visual: Visual tokens of each image, in order; None for images of `image_size` without
                tiles.

        Raises:
            InputError: The text has a placeholder of its own, or the chat template refuses it.
        """
        if visual is None:
            contents = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
            images = sum(
                part["type"] in IMAGE_PART_KEYS for content in contents for part in content
            )
            visual = [(self.image_size // REDUCTION) ** 2] * images
        text = templated(self.tokenizer, self.name, messages)
        numbers = iter(visual)
        found = expand_image_tokens(self.tokenizer, text, self.image_token, numbers)
        if next(numbers, None) is not None:
            raise InputError("The chat template has no place for an image.")
        return found

    def __call__(
        self, messages: Sequence[Message] | TokenPrompt, **options: Unpack[ImageOptions]
    ) -> tuple[list[int], list[Tensor]]:
        """Return a prompt's tokens, and each image's tiles, (tiles, 3, size, size) in [0, 1]."""
        if isinstance(messages, TokenPrompt):
            return checked_tokens(messages, self.vocabulary_size, self.image_token), []
        shown: ImageOptions = {"image_size": self.image_size, **options}
        turns = dialogue(messages)
        tiles = [prepare(image, **shown) for image in images_of(turns)]
        visual = [len(image) * (image.shape[-1] // REDUCTION) ** 2 for image in tiles]
        written = [
            # Templates may write a text and a list of one text differently.
            given if isinstance(given["content"], str) else turn
            for given, turn in zip(messages, turns, strict=True)
        ]
        return self.tokens(Dialogue(written, tools_of(messages)), visual), tiles


class FastViTHDPromptBuilder:
    """Builds prompts for a model around a FastViTHD encoder. See `PromptBuilder`.

    Args:
        model: The model, whose encoder is used in its current form.
        tokenizer: Its tokenizer, with a chat template.
        decoder: The model's decoder, split.

    Raises:
        InputError: The tokenizer has no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoder: SplitDecoder
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"The tokenizer of {type(model).__name__} has no chat template, so fastvlm can't"
                " tell how a prompt is put to it; set tokenizer.chat_template."
            )
        # Which methods and settings a composite model has is its class's matter.
        self.model: Any = model
        self.tokenizer, self.decoder, self.shows_images = tokenizer, decoder, True

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model was made for."""
        return cast(FastViTHD, self.model.base_model.vision_tower).config.image_size

    @property
    def prepare(self) -> FastViTHDInputs:
        """A function that returns a dialogue's tokens and tiles. See `PromptBuilder.prepare`."""
        return FastViTHDInputs(
            self.tokenizer,
            type(self.model).__name__,
            self.model.config.image_token_id,
            self.image_size,
            self.model.config.get_text_config().vocab_size,
        )

    def tokens(self, messages: Sequence[Message], visual: Sequence[int] | None = None) -> list[int]:
        """Return a dialogue's tokens. See `FastViTHDInputs.tokens`."""
        return self.prepare.tokens(messages, visual)

    def rendered(self, messages: Sequence[Message]) -> str:
        """Return a dialogue's text. See `PromptBuilder.rendered`."""
        return templated(self.tokenizer, type(self.model).__name__, messages)

    def inputs(
        self, messages: Sequence[Message] | TokenPrompt, **options: Unpack[ImageOptions]
    ) -> dict[str, Tensor]:
        """Return one row of inputs for the model's `generate`. See `PromptBuilder.inputs`.

        Returns:
            `input_ids` and `attention_mask`, (1, length); with images also `pixel_values`, (tiles
            of all images, 3, size, size) in [0, 1].
        """
        tokens, tiles = self.prepare(messages, **options)
        row = torch.tensor([tokens], device=self.decoder.device)
        found = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if tiles:
            found["pixel_values"] = self._placed(torch.cat(tiles))
        return found

    @property
    def encoded_together(self) -> int:
        """The most prompts that `encoded` gains from. See `PromptBuilder.encoded_together`."""
        return ENCODED_TOGETHER

    def decoder_inputs(
        self,
        messages: Sequence[Message] | TokenPrompt,
        cache: ImageFeatureCache | None = None,
        **options: Unpack[ImageOptions],
    ) -> DecoderInputs:
        """Return a prompt as the decoder's inputs. See `PromptBuilder.decoder_inputs`."""
        [found] = self.encoded([self.prepare(messages, **options)], cache)
        return found

    @torch.no_grad()
    def encoded(
        self,
        prepared: Sequence[tuple[list[int], list[Tensor]]],
        cache: ImageFeatureCache | None = None,
    ) -> list[DecoderInputs]:
        """Return prompts as the decoder's inputs, with images of one size encoded in one pass.

        See `PromptBuilder.encoded`.
        """
        images = [image for _, tiles in prepared for image in tiles]
        # What is kept nowhere needs no digest, and hashing an image takes milliseconds.
        names = [None if cache is None else digest(image) for image in images]
        shown = zip(names, self._features(images, names, cache), strict=True)
        return [
            self._with_images(tokens, [*islice(shown, len(tiles))], keyed=cache is not None)
            for tokens, tiles in prepared
        ]

    def _with_images(
        self, tokens: list[int], shown: Sequence[tuple[str | None, Tensor]], *, keyed: bool
    ) -> DecoderInputs:
        """Return a prompt with its images' features, given with their digests, in their places."""
        row = torch.tensor(tokens, device=self.decoder.device)
        embeddings = self.decoder.embed(row)
        if not shown:
            return DecoderInputs(tokens, embeddings, keys=[*tokens])
        image_token = self.model.config.image_token_id
        places = row == image_token
        features = torch.cat([features for _, features in shown])
        embeddings = embeddings.masked_scatter(places[:, None], features)
        if not keyed:
            return DecoderInputs(tokens, embeddings)
        seen: Iterator[Hashable] = (
            (name, number) for name, features in shown for number in range(len(features))
        )
        keys = [next(seen) if token == image_token else token for token in tokens]
        return DecoderInputs(tokens, embeddings, keys=keys)

    def _placed(self, tiles: Tensor) -> Tensor:
        return tiles.to(self.decoder.device, self.decoder.dtype)

    def _features(
        self, images: Sequence[Tensor], names: Sequence[str | None], cache: ImageFeatureCache | None
    ) -> list[Tensor]:
        """Return images' visual tokens, (visual tokens, d_model) each, encoded if they aren't kept.

        Args:
            images: What `prepare` made of each: (tiles, 3, size, size) in [0, 1].
            names: Their digests; None without a cache.
            cache: Where they are kept; None for nowhere.
        """
        found: dict[str | int, Any] = {}
        missing: dict[str | int, Tensor] = {}
        keys = [number if name is None else name for number, name in enumerate(names)]
        for key, image in zip(keys, images, strict=True):
            kept = None if cache is None or not isinstance(key, str) else cache.get(key)
            if kept is None:
                missing[key] = image
            else:
                found[key] = kept
        for group in _one_pass_each(missing):
            # One tensor, or one for each tile: releases of transformers differ.
            pixels = self._placed(torch.cat([missing[key] for key in group]))
            encoded = torch.cat([*self.model.get_image_features(pixels).pooler_output])
            visual = len(encoded) // len(pixels)
            parts = encoded.split([visual * len(missing[key]) for key in group])
            for key, part in zip(group, parts, strict=True):
                found[key] = part
                if cache is not None and isinstance(key, str):
                    # A part of a larger tensor would keep all of it.
                    found[key] = part.clone()
                    cache.put(key, found[key])
        return [found[key] for key in keys]


def _one_pass_each(images: dict[str | int, Tensor]) -> Iterator[list[str | int]]:
    """Yield images by their keys in groups that go through the encoder together."""
    by_size: dict[int, list[str | int]] = {}
    for key, image in images.items():
        by_size.setdefault(image.shape[-1], []).append(key)
    for keys in by_size.values():
        group: list[str | int] = []
        pixels = 0
        for key in keys:
            own = images[key][:, 0].numel()
            if group and pixels + own > PIXELS_TOGETHER:
                yield group
                group, pixels = [], 0
            group.append(key)
            pixels += own
        yield group


def expand_image_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, image: int, visual: Iterator[int]
) -> list[int]:
    """Return the tokens of a text, with each image's placeholder repeated for its visual tokens.

    Args:
        tokenizer: The model's tokenizer.
        text: The output of the chat template.
        image: The placeholder.
        visual: Visual tokens of the remaining images; those of the text's images are consumed.

    Raises:
        InputError: The text has more placeholders than there are images, or the tokenizer is
            broken.
    """
    try:
        tokens = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # of whatever its settings make it stumble over
        raise InputError(f"The tokenizer refuses the prompt: {first_line(error)}.") from error
    found: list[int] = []
    for token in tokens:
        number = next(visual, None) if token == image else 1
        if number is None:
            raise InputError("The prompt must not contain the image's placeholder itself.")
        found += [token] * number
    return found
