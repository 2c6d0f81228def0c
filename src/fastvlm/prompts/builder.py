"""The interface of prompt builders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Unpack

from torch import Tensor

from fastvlm.functional.messages import Message, TokenPrompt
from fastvlm.language import DecoderInputs
from fastvlm.prompts.features import ImageFeatureCache
from fastvlm.vision.images import ImageOptions


class PromptBuilder(Protocol):
    """Builds a model's prompts from dialogues, in any thread, without changing the model."""

    @property
    def shows_images(self) -> bool:
        """Whether the model sees images, or reads text alone."""
        ...

    @property
    def prepare(self) -> Callable[..., Any]:
        """A function that prepares a prompt without the model: opens images, tokenizes texts.

        Its arguments and errors are those of `inputs`. It can be pickled, for processes that
        prepare data.
        """
        ...

    @property
    def encoded_together(self) -> int:
        """The most prompts that `encoded` gains from being given at once."""
        ...

    def rendered(self, messages: Sequence[Message]) -> str:
        """Return a dialogue as its chat template writes it, up to where the reply begins.

        Raises:
            InputError: The template refuses it, or leaves out its functions.
        """
        ...

    def inputs(
        self, messages: Sequence[Message] | TokenPrompt, **options: Unpack[ImageOptions]
    ) -> dict[str, Tensor]:
        """Return one row of inputs for the model's own `generate`: `model.generate(**inputs)`.

        Args:
            messages: The dialogue, the last turn the user's; or tokens.
            options: How images are shown, see `ImageOptions`.

        Returns:
            `input_ids` and `attention_mask`, (1, length), and with images the model's inputs for
            them, such as `pixel_values`; on the model's device, in its precision.

        Raises:
            InputError: An image can't be read, the text has a placeholder of its own, the model
                doesn't support such a dialogue, a token is not the model's, or an option is out of
                range.
        """
        ...

    def decoder_inputs(
        self,
        messages: Sequence[Message] | TokenPrompt,
        cache: ImageFeatureCache | None = None,
        **options: Unpack[ImageOptions],
    ) -> DecoderInputs:
        """Return a prompt as the inputs of the model's decoder.

        Args:
            messages: The dialogue, the last turn the user's; or tokens.
            cache: Where image features are looked up and kept; None for no cache.
            options: How images are shown, see `ImageOptions`.

        Returns:
            The decoder's inputs. `keys` are None for an encoder-decoder, and for images that have
            no digest: without a cache, or where a model computes features in another way.

        Raises:
            InputError: As `inputs`, or the model passes its decoder arguments that fastvlm doesn't
                support.
        """
        ...

    def encoded(
        self, prepared: Sequence[Any], cache: ImageFeatureCache | None = None
    ) -> list[DecoderInputs]:
        """Return prompts as the inputs of the model's decoder.

        Args:
            prepared: What `prepare` made of each.
            cache: See `decoder_inputs`.

        Raises:
            InputError: The model passes its decoder arguments that fastvlm doesn't support.
        """
        ...
