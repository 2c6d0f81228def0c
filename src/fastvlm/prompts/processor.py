"""Prompts of any model, prepared by the model's own processor and by the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.functional.errors import FastVlmError, InputError, first_line
from fastvlm.functional.messages import Dialogue, Message, TokenPrompt, tools_of
from fastvlm.language import DecoderInputs, SplitDecoder, capture_decoder_inputs
from fastvlm.prompts.features import ImageFeatureCache
from fastvlm.prompts.messages import checked_tokens, dialogue, images_of, templated
from fastvlm.vision.images import ImageOptions
from fastvlm.vision.loading import load_image

REQUIRED_SETTINGS = ("patch_size", "num_query_tokens", "vision_feature_select_strategy")
"""Settings that must not be None where a processor has them, to count an image's tokens."""


class ProcessorInputs:
    """Prepares a model's inputs with its chat template and processor, but without the model.

    It can be pickled, for processes that prepare data.

    Args:
        model: The model, for its configuration.
        processor: Its processor, or the tokenizer of a model of text alone.

    Raises:
        InputError: The processor has no chat template, and its kind needs one.
    """

    def __init__(
        self, model: PreTrainedModel, processor: PreTrainedTokenizerBase | ProcessorMixin
    ) -> None:
        # What a processor has besides a tokenizer is its class's matter.
        self.processor: Any = processor
        self.name = type(model).__name__
        config: Any = model.config
        own = getattr(config, "image_token_index", None)
        self.image_token: int | None = getattr(config, "image_token_id", own)
        self.vocabulary_size: int = config.get_text_config().vocab_size
        self.shows_images = isinstance(processor, ProcessorMixin)
        # BLIP-2 and InstructBLIP learnt from texts without turns, and their processors take no
        # template; a decoder of text alone may have none either.
        takes_template = "chat_template" in inspect.signature(type(processor).__init__).parameters
        if self.shows_images and takes_template and not processor.chat_template:
            raise InputError(
                f"The processor of {self.name} has no chat template, so fastvlm can't tell how a"
                " prompt is put to the model; set processor.chat_template and save it again."
            )

    def __call__(
        self, messages: Sequence[Message] | TokenPrompt, **options: Unpack[ImageOptions]
    ) -> dict[str, Tensor]:
        """Return one row of inputs for the model's `generate`.

        Raises:
            InputError: An image can't be read, the text has a placeholder of its own, the model,
                its template or its processor doesn't support such a dialogue, a token is not the
                model's, or an option is given.
        """
        if options:
            raise InputError(
                f"The processor of {self.name} decides how an image is shown; leave out"
                f" {', '.join(options)}."
            )
        if isinstance(messages, TokenPrompt):
            row = torch.tensor([checked_tokens(messages, self.vocabulary_size, self.image_token)])
            return {"input_ids": row, "attention_mask": torch.ones_like(row)}
        turns = dialogue(messages)
        shown = images_of(turns)
        if shown and not self.shows_images:
            raise InputError(f"{self.name} reads text alone; leave out the image.")
        images = [load_image(image) for image in shown]
        text = self.text(turns, len(images))
        try:
            found = self.processed(text, images)
        except Exception as error:  # a processor and its tokenizer have errors of any kind
            raise InputError(
                f"The processor of {self.name} refuses the prompt: {first_line(error)}."
                f"{self.lacking()}"
            ) from error
        if images:
            self.check_shown(found)
        return found

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.processor, "chat_template", None))

    def text(self, messages: Sequence[Message], images: int) -> str:
        """Return a dialogue as one text, with a placeholder for each of its images.

        Raises:
            InputError: The text has a placeholder of its own, or the model or its template doesn't
                support such a dialogue.
        """
        if self.has_template:
            text, places = self.templated(messages), images
        else:
            check_plain(self.name, messages, images if self.shows_images else None)
            # The processor puts the image before the text itself.
            text, places = plain_text(messages[0]), 0
        for name, number in (("image_token", places), ("video_token", 0)):
            token = getattr(self.processor, name, None)
            if token is not None and text.count(str(token)) != number:
                raise InputError("The prompt must not contain the image's placeholder itself.")
        return text

    def templated(self, messages: Sequence[Message]) -> str:
        """Return a dialogue rendered by the chat template.

        Raises:
            InputError: The template refuses it.
        """
        # Templates of processors read lists of parts, and pass over texts; those of tokenizers the
        # other way round.
        write = bare if self.shows_images else plain_text
        turns = [{**message, "content": write(message)} for message in messages]
        return templated(self.processor, self.name, Dialogue(turns, tools_of(messages)))

    def lacking(self) -> str:
        """Return a sentence on settings that the processor's file lacks; empty if it lacks none."""
        names = [name for name in REQUIRED_SETTINGS if getattr(self.processor, name, 0) is None]
        if not names:
            return ""
        listed = " and ".join(names)
        return (
            f" Its processor_config.json has no {listed}, of which the model's configuration may"
            " tell; set it there."
        )

    def check_shown(self, inputs: dict[str, Tensor]) -> None:
        """Refuse processed images that the model would not see.

        Raises:
            InputError: The inputs have no pixels, or no position for image features.
        """
        if not has_pixels(inputs):
            raise InputError(
                f"The processor of {self.name} made no pixels of the image, so the model would not"
                f" see it.{self.lacking()}"
            )
        token = self.image_token
        if token is not None and not (inputs["input_ids"] == token).any():
            raise InputError(
                f"The processor of {self.name} left no place for the image in the prompt, so the"
                f" model would not see it.{self.lacking()}"
            )

    def processed(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the processor's output for a text and its images."""
        options: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        start = tokenizer_of(self.processor).bos_token
        begun = start is not None and text.startswith(start)
        if self.has_template and (begun or not self.shows_images):
            # As transformers' own apply_chat_template has it.
            options["add_special_tokens"] = False
        if not self.shows_images:
            options["return_token_type_ids"] = False
        elif images:
            # The images of one row: beside others an image may be shown differently.
            options["images"] = [list(images)]
        found: dict[str, Tensor] = dict(self.processor(**options))
        return found


class ProcessorPromptBuilder:
    """Builds prompts as `transformers` does: chat template, processor, the model up to its decoder.

    See `PromptBuilder`.

    Args:
        model: The model, which is not changed.
        processor: Its processor, or the tokenizer of a model of text alone.
        decoder: The model's decoder, split.

    Raises:
        InputError: The processor has no chat template, and its kind needs one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        decoder: SplitDecoder,
    ) -> None:
        self.model, self.decoder, self.processor = model, decoder, processor
        self.prepare = ProcessorInputs(model, processor)
        self.name, self.shows_images = self.prepare.name, self.prepare.shows_images
        self.encoded_together = 1

    def rendered(self, messages: Sequence[Message]) -> str:
        """Return a dialogue's text. See `PromptBuilder.rendered`."""
        turns = dialogue(messages)
        if not self.prepare.has_template:
            check_plain(self.name, turns, None)
            return plain_text(turns[0])
        return self.prepare.templated(turns)

    def inputs(
        self, messages: Sequence[Message] | TokenPrompt, **options: Unpack[ImageOptions]
    ) -> dict[str, Tensor]:
        """Return one row of inputs for the model's `generate`. See `PromptBuilder.inputs`."""
        prepared = self.prepare(messages, **options)
        return placed(prepared, self.decoder.device, self.decoder.dtype)

    def decoder_inputs(
        self,
        messages: Sequence[Message] | TokenPrompt,
        cache: ImageFeatureCache | None = None,
        **options: Unpack[ImageOptions],
    ) -> DecoderInputs:
        """Return a prompt as the decoder's inputs. See `PromptBuilder.decoder_inputs`."""
        [found] = self.encoded([self.prepare(messages, **options)], cache)
        return found

    def encoded(
        self, prepared: Sequence[dict[str, Tensor]], cache: ImageFeatureCache | None = None
    ) -> list[DecoderInputs]:
        """Return prompts as the decoder's inputs, one after another. See `PromptBuilder`."""
        return [self._encoded(inputs, cache) for inputs in prepared]

    def _encoded(
        self, prepared: dict[str, Tensor], cache: ImageFeatureCache | None
    ) -> DecoderInputs:
        inputs = placed(prepared, self.decoder.device, self.decoder.dtype)
        if cache is None:
            found, digests = self.capture(inputs), []
        else:
            with cache.patched(self.model) as digests:
                found = self.capture(inputs)
        if found.encoder_states is not None:
            # An encoder reads the whole source before the decoder's first position.
            return found
        keys = self.keys(found.token_ids, digests if has_pixels(inputs) else None)
        return found if keys is None else found.with_keys(keys)

    def capture(self, inputs: dict[str, Tensor]) -> DecoderInputs:
        """Return the decoder's inputs for one row of the model's inputs.

        Raises:
            InputError: The model refuses them, or passes its decoder arguments that fastvlm doesn't
                support.
        """
        try:
            [found] = capture_decoder_inputs(self.model, inputs)
        except FastVlmError:
            raise
        except Exception as error:  # a model whose configuration lacks something fails in any way
            raise InputError(
                f"{self.name} refuses what its processor made of the prompt: {first_line(error)}."
            ) from error
        return found

    def keys(
        self, token_ids: Sequence[int], digests: Sequence[str] | None
    ) -> list[Hashable] | None:
        """Return a key for each position, equal for positions with equal contents; None if unknown.

        Args:
            token_ids: The prompt's tokens.
            digests: Digests of the model's calls of its image encoder; None for a prompt without
                images. Each image's key is made of all of them, as a processor may show an image
                differently beside another.
        """
        if digests is None:
            return [*token_ids]
        config: Any = self.model.config
        image = getattr(config, "image_token_id", None)
        # Without a digest or without a place, other images would have the same keys.
        if not digests or image not in token_ids:
            return None
        images, number = "".join(digests), count()
        return [(images, next(number)) if token == image else token for token in token_ids]


def placed(
    inputs: Mapping[str, Tensor], device: torch.device | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Move inputs to a device, and those in floating point to a precision.

    Args:
        inputs: The inputs by name.
        device: The device; None to leave them where they are.
        dtype: The precision; None to leave it as it is.
    """
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def has_pixels(inputs: Mapping[str, Tensor]) -> bool:
    """Return whether a processor's output shows an image: all else is whole numbers."""
    return any(value.is_floating_point() for value in inputs.values())


def bare(message: Message) -> list[dict[str, Any]]:
    """Return the parts of a turn, without the contents of images."""
    parts = message["content"]
    return [{"type": "image"} if part["type"] == "image" else dict(part) for part in parts]


def plain_text(message: Message) -> str:
    """Return the text of a turn."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def check_plain(name: str, messages: Sequence[Message], images: int | None) -> None:
    """Refuse a dialogue that a model without a chat template doesn't support.

    Args:
        name: The model's name, for error messages.
        messages: The dialogue.
        images: The number of images; None for a model of text alone.

    Raises:
        InputError: It is not a single turn of the user, has functions that the model may call, or
            has not exactly one image.
    """
    if tools_of(messages):
        raise InputError(f"{name} has no chat template, so it can't be shown tools.")
    if [message.get("role") for message in messages] != ["user"]:
        raise InputError(
            f"{name} has no chat template and takes a single prompt, so a dialogue is one turn of"
            f" the user's; got {len(messages)} turns."
        )
    if images not in (None, 1):
        raise InputError(f"{name} takes one image with each prompt; got {images}.")
