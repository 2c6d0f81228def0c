"""Prompts of models around a FastViTHD encoder, whose pictures are prepared here."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastvlm.data.conversations import Message
from fastvlm.functional.errors import InputError
from fastvlm.language import SplitDecoder
from fastvlm.language.prefix import PrefixStore
from fastvlm.prompts.encoded import Encoded
from fastvlm.prompts.features import digest
from fastvlm.prompts.messages import pictures_of
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vision.fastvithd import FastViTHD
from fastvlm.vision.pictures import PictureOptions, prepare


class FastViTHDPrompts:
    """Makes prompts for a model around a FastViTHD encoder.

    Args:
        model: The model; its encoder is folded for inference.
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
        self.tokenizer, self.decoder = tokenizer, decoder
        tower = cast(FastViTHD, model.base_model.vision_tower)
        # Folding is exact, so nobody who loads a model for inference wants the branches.
        tower.fuse()
        self.image_size: int = tower.config.image_size

    def tokens(self, messages: Sequence[Message], visual: Sequence[int]) -> list[int]:
        """Return a dialogue's tokens, with a placeholder for every visual token.

        Args:
            messages: The dialogue; what an image is does not matter.
            visual: Visual tokens of each picture, in their order.

        Raises:
            InputError: The text has a placeholder of its own.
        """
        turns = [dict(message) for message in messages]
        text = str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )
        numbers = iter(visual)
        found = with_places(self.tokenizer, text, self.model.config.image_token_id, numbers)
        if next(numbers, None) is not None:
            raise InputError("The chat template has no place for a picture.")
        return found

    @torch.inference_mode()
    def encode(
        self,
        messages: Sequence[Message],
        store: PrefixStore | None = None,
        **options: Unpack[PictureOptions],
    ) -> Encoded:
        """Return a dialogue as the decoder takes it. See `Prompts.encode`."""
        shown: PictureOptions = {"image_size": self.image_size, **options}
        views = [prepare(picture, **shown) for picture in pictures_of(messages)]
        visual = [len(view) * (view.shape[-1] // REDUCTION) ** 2 for view in views]
        tokens = self.tokens(messages, visual)
        row = torch.tensor(tokens, device=self.decoder.device)
        embeddings = self.decoder.embed(row)
        keys: list[Hashable] = [*tokens]
        if views:
            places = row == self.model.config.image_token_id
            # What is kept nowhere needs no name, and hashing a picture takes milliseconds.
            digests = ["" if store is None else digest(view) for view in views]
            features = [
                self.features(view, name, store) for view, name in zip(views, digests, strict=True)
            ]
            embeddings = embeddings.masked_scatter(places[:, None], torch.cat(features))
            seen = [
                (name, n) for name, size in zip(digests, visual, strict=True) for n in range(size)
            ]
            for place, key in zip(places.nonzero()[:, 0].tolist(), seen, strict=True):
                keys[place] = key
        return Encoded(tokens, embeddings, keys)

    def features(self, views: Tensor, name: str, store: PrefixStore | None) -> Tensor:
        """Return a picture's visual tokens, (visual tokens, d_model), encoded if they aren't kept.

        Args:
            views: What `prepare` made of it: (views, 3, size, size) in [0, 1].
            name: Its digest.
            store: Where they are kept; None for nowhere.
        """
        found: Any = None if store is None else store.features(name)
        if found is None:
            pixels = views.to(self.decoder.device, self.decoder.dtype)
            found = self.model.get_image_features(pixels).pooler_output.flatten(0, 1)
            if store is not None:
                store.keep_features(name, found)
        return found


def with_places(
    tokenizer: PreTrainedTokenizerBase, text: str, image: int, visual: Iterator[int]
) -> list[int]:
    """Return the tokens of a text, a picture's placeholder once for each of its visual tokens.

    Args:
        tokenizer: The model's.
        text: What the chat template wrote.
        image: The placeholder.
        visual: Visual tokens of the pictures that are left; those in the text are taken.

    Raises:
        InputError: The text has a placeholder more than there are pictures.
    """
    found: list[int] = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        number = next(visual, None) if token == image else 1
        if number is None:
            raise InputError("The prompt must not contain the picture's placeholder itself.")
        found += [token] * number
    return found
