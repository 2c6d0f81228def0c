"""What makes a model's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Unpack

from torch import Tensor

from fastvlm.functional.messages import Message
from fastvlm.language import DecoderInputs
from fastvlm.prompts.features import ImageFeatureCache
from fastvlm.vision.images import ImageOptions


class PromptBuilder(Protocol):
    """Makes a model's prompts of dialogues, from any thread; it leaves the model as it is."""

    @property
    def shows_images(self) -> bool:
        """Whether the model sees images, or reads text alone."""
        ...

    @property
    def prepare(self) -> Callable[[Sequence[Message]], Any]:
        """What is done with a dialogue before the model sees it: images opened, texts tokenised.

        It can be pickled, for the processes that prepare data, and raises what `inputs` does.
        """
        ...

    def inputs(
        self, messages: Sequence[Message], **options: Unpack[ImageOptions]
    ) -> dict[str, Tensor]:
        """Return what the model's own `generate` takes, of one row: `model.generate(**inputs)`.

        Args:
            messages: The dialogue, the last turn the user's.
            options: How the images are shown, see `ImageOptions`.

        Returns:
            `input_ids` and `attention_mask`, (1, length), and with images what the model takes for
            them, such as `pixel_values`; on the model's device, in its precision.

        Raises:
            InputError: An image can't be read, the text has a placeholder of its own, the model
                has no use for such a dialogue, or an option is out of range.
        """
        ...

    def decoder_inputs(
        self,
        messages: Sequence[Message],
        cache: ImageFeatureCache | None = None,
        prepared: Any = None,
        **options: Unpack[ImageOptions],
    ) -> DecoderInputs:
        """Return a dialogue as the model's decoder takes it.

        Args:
            messages: The dialogue, the last turn the user's.
            cache: Where images' features are found and kept; None for nowhere.
            prepared: What `prepare` made of the dialogue; None where that is still to be done.
            options: How the images are shown, see `ImageOptions`.

        Returns:
            The decoder's inputs. `keys` are None for an encoder-decoder, and for images that have
            no digest: without a cache, or where a model takes another way to their features.

        Raises:
            InputError: As `inputs`, or the model hands its decoder what fastvlm doesn't know.
        """
        ...
