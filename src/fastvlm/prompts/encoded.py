"""A prompt as a decoder takes it, and what makes one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, Unpack

from torch import Tensor

from fastvlm.data.conversations import Message
from fastvlm.language.prefix import PrefixStore
from fastvlm.vision.pictures import PictureOptions


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt, ready for the decoder.

    Args:
        tokens: Its tokens, a placeholder for each visual token.
        embeddings: (length, d_embedding).
        keys: What tells each position from others: its token, or the pictures and the visual token.
            None, where prompts that begin alike have nothing in common.
        positions: Time, height and width of each position, (3, length), for a model that tells
            them apart; None for 0, 1, 2 ...
        memory: An encoder-decoder's encoded source, (source, d_model); None for other models.
    """

    tokens: list[int]
    embeddings: Tensor
    keys: list[Hashable] | None
    positions: Tensor | None = None
    memory: Tensor | None = None


class Prompts(Protocol):
    """What makes a model's prompts."""

    def encode(
        self,
        messages: Sequence[Message],
        store: PrefixStore | None = None,
        **options: Unpack[PictureOptions],
    ) -> Encoded:
        """Return a dialogue as the decoder takes it.

        Args:
            messages: The dialogue, the last turn the user's.
            store: Where pictures' features are found and kept; None for nowhere.
            options: How the pictures are shown, see `PictureOptions`.

        Raises:
            InputError: A picture can't be read, the text has a placeholder of its own, the model
                has no use for a dialogue like that, or an option is out of range.
        """
        ...
