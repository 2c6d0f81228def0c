"""Phi-4 Multimodal: a decoder of the usual form, whose `generate` loses short prompts."""

from __future__ import annotations

from fastvlm.language.general import GeneralDecoder


class Phi4MultimodalDecoder(GeneralDecoder):
    """The decoder of Phi-4 Multimodal. See `GeneralDecoder`.

    Where a reply passes `original_max_position_embeddings`, `generate` of `transformers` empties
    its cache as it does for Phi-3, but then hands the model the last token alone instead of all,
    for each token from there on. No reply is made of that here: it ends.
    """

    @property
    def _switch(self) -> int:
        length: int = self.decoder.config.original_max_position_embeddings
        return length

    def room(self, length: int) -> int | None:
        """Return how many tokens a reply may have. See `SplitDecoder.room`."""
        # The last one is never computed with.
        return self._switch + 1 - length if length <= self._switch else None

    @property
    def ending(self) -> str:
        """Where a reply without room ends. See `SplitDecoder.ending`."""
        return f"at {self._switch} positions, beyond which transformers' generate loses the prompt"
