"""Prompts of any model, prepared by the model's own processor and by the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from itertools import count
from typing import Any, Unpack

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.data.conversations import Message
from fastvlm.functional.errors import InputError, first_line
from fastvlm.language import SplitDecoder, captured
from fastvlm.language.prefix import PrefixStore
from fastvlm.prompts.encoded import Encoded
from fastvlm.prompts.features import FeatureMemory
from fastvlm.prompts.messages import parts_of, pictures_of
from fastvlm.vision.pictures import PictureOptions, open_picture


class ProcessorPrompts:
    """Makes prompts as `transformers` does: chat template, processor, the model up to its decoder.

    Args:
        model: The model.
        processor: Its processor, or the tokenizer of a model of text alone.
        decoder: The model's decoder, split.

    Raises:
        InputError: The processor has no chat template, and is of a kind that has one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        decoder: SplitDecoder,
    ) -> None:
        # What a processor has besides a tokenizer is its class's matter.
        self.model, self.decoder = model, decoder
        self.processor: Any = processor
        self.name = type(model).__name__
        self.shows_pictures = isinstance(processor, ProcessorMixin)
        self.features = FeatureMemory(model)
        # BLIP-2 and InstructBLIP learnt from texts without turns, and their processors take no
        # template; a decoder of text alone may have none either.
        takes_template = "chat_template" in inspect.signature(type(processor).__init__).parameters
        if self.shows_pictures and takes_template and not processor.chat_template:
            raise InputError(
                f"The processor of {self.name} has no chat template, so fastvlm can't tell how a"
                " prompt is put to the model; set processor.chat_template and save it again."
            )

    def encode(
        self,
        messages: Sequence[Message],
        store: PrefixStore | None = None,
        **options: Unpack[PictureOptions],
    ) -> Encoded:
        """Return a dialogue as the decoder takes it. See `Prompts.encode`."""
        if options:
            raise InputError(
                f"The processor of {self.name} decides how a picture is shown; leave out"
                f" {', '.join(options)}."
            )
        inputs = self.inputs(messages)
        with self.features.answering(store) as asked:
            try:
                [prompt] = captured(self.model, inputs)
            except ValueError as error:
                raise InputError(
                    f"{self.name} refuses what its processor made of the prompt:"
                    f" {first_line(error)}"
                ) from error
        return Encoded(
            prompt.tokens,
            prompt.embeddings,
            # An encoder reads the whole source before the decoder's first position.
            self.keys(prompt.tokens, "".join(asked)) if prompt.memory is None else None,
            prompt.positions,
            prompt.memory,
        )

    def keys(self, tokens: Sequence[int], pictures: str) -> list[Hashable]:
        """Return what tells each position from others.

        Args:
            tokens: The prompt's tokens.
            pictures: Digest of all its pictures; a processor may show one differently beside
                another, so that none has a name of its own.
        """
        image = getattr(self.model.config, "image_token_id", None)
        number = count()
        return [(pictures, next(number)) if token == image else token for token in tokens]

    def inputs(self, messages: Sequence[Message]) -> dict[str, Tensor]:
        """Return what a model's `generate` takes, of one row.

        Raises:
            InputError: A picture can't be read, the text has a placeholder of its own, or the
                model, its template or its processor has no use for such a dialogue.
        """
        pictures = [open_picture(picture) for picture in pictures_of(messages)]
        if pictures and not self.shows_pictures:
            raise InputError(f"{self.name} reads text alone; leave out the picture.")
        text = self.text(messages, len(pictures))
        try:
            found = self.processed(text, pictures)
        except (TypeError, ValueError) as error:
            # A setting that older checkpoints lack is None here, and can't be computed with.
            raise InputError(
                f"The processor of {self.name} refuses the prompt: {first_line(error)}"
            ) from error
        device, dtype = self.decoder.device, self.decoder.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in found.items()
        }

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.processor, "chat_template", None))

    def text(self, messages: Sequence[Message], pictures: int) -> str:
        """Return a dialogue as one text, with a placeholder for each of its pictures.

        Raises:
            InputError: The text has a placeholder of its own, or the model or its template has no
                use for such a dialogue.
        """
        if self.has_template:
            text, places = self.templated(messages), pictures
        else:
            check_plain(self.name, messages, pictures if self.shows_pictures else None)
            # The processor puts the picture before the text itself.
            text, places = plain_text(messages[0]), 0
        for name, number in (("image_token", places), ("video_token", 0)):
            token = getattr(self.processor, name, None)
            if token is not None and text.count(str(token)) != number:
                raise InputError("The prompt must not contain the picture's placeholder itself.")
        return text

    def templated(self, messages: Sequence[Message]) -> str:
        """Return a dialogue as the chat template writes it.

        Raises:
            InputError: The template refuses it.
        """
        turns: list[dict[str, Any]] = [
            # Templates of processors read lists of parts, and pass over texts; those of tokenizers
            # the other way round.
            {**message, "content": bare(message) if self.shows_pictures else plain_text(message)}
            for message in messages
        ]
        try:
            written: str = self.processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise InputError(
                f"The chat template of {self.name} refuses the dialogue: {first_line(error)}"
            ) from error
        return written

    def processed(self, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return what the processor makes of a text and the pictures in it."""
        options: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        start = tokenizer_of(self.processor).bos_token
        begun = start is not None and text.startswith(start)
        if self.has_template and (begun or not self.shows_pictures):
            # As transformers' own apply_chat_template has it.
            options["add_special_tokens"] = False
        if not self.shows_pictures:
            options["return_token_type_ids"] = False
        elif pictures:
            # The pictures of one row: beside others a picture may be shown differently.
            options["images"] = [list(pictures)]
        found: dict[str, Tensor] = dict(self.processor(**options))
        return found


def bare(message: Message) -> list[dict[str, Any]]:
    """Return the parts of a turn without the pictures themselves."""
    return [
        {"type": "image"} if part["type"] == "image" else dict(part) for part in parts_of(message)
    ]


def plain_text(message: Message) -> str:
    """Return the text of a turn."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def check_plain(name: str, messages: Sequence[Message], pictures: int | None) -> None:
    """Refuse what a model without a chat template can't be given.

    Args:
        name: The model's.
        messages: The dialogue.
        pictures: How many pictures it has; None for a model of text alone.

    Raises:
        InputError: It is not one turn of the user's, or the pictures are not one.
    """
    if [message.get("role") for message in messages] != ["user"]:
        raise InputError(
            f"{name} has no chat template and takes a single prompt, so a dialogue is one turn of"
            f" the user's; got {len(messages)} turns."
        )
    if pictures not in (None, 1):
        raise InputError(f"{name} takes one picture with each prompt; got {pictures}.")
