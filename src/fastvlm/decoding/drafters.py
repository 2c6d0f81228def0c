"""The strategies by name, for a model and its draft."""

from __future__ import annotations

from typing import TypedDict, Unpack

from fastvlm.decoding.strategies import Autoregressive, Drafter, PromptLookup, SelfSpeculative
from fastvlm.drafting.draft_length import draft_length
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder

STRATEGIES = ("autoregressive", "imitation", "early-exit", "lookup")


class DraftOptions(TypedDict, total=False):
    """How drafts are made.

    Args:
        num_speculative_tokens: The most tokens in a draft; what the draft records, if not given.
        confidence: The drafter's own probability below which a draft ends; 0 for drafts of fixed
            length. What the draft records, if not given (for `early-exit`: 0.5).
        exit_layer: For `early-exit`: the layers that draft; a quarter of them, if not given.
    """

    num_speculative_tokens: int | None
    confidence: float | None
    exit_layer: int | None


class Drafters:
    """Makes the ways of drafting for a model.

    Args:
        decoder: The target.
        network: Its imitation network, if there is one.
    """

    def __init__(self, decoder: SplitDecoder, network: ImitationNetwork | None = None) -> None:
        self.decoder, self.network = decoder, network

    def make(self, strategy: str | None = None, **options: Unpack[DraftOptions]) -> Drafter:
        """Return a way of drafting.

        Args:
            strategy: One of `STRATEGIES`; None for `imitation` where there is a draft, and for
                `autoregressive` where there is none.
            options: See `DraftOptions`.

        Raises:
            InputError: The strategy is unknown, needs a draft that isn't there, or an option is
                out of range.
        """
        strategy = strategy or ("autoregressive" if self.network is None else "imitation")
        tokens, confidence = options.get("num_speculative_tokens"), options.get("confidence")
        if strategy == "autoregressive":
            return Autoregressive()
        if strategy == "lookup":
            return PromptLookup(10 if tokens is None else tokens)
        if strategy == "early-exit":
            layer = options.get("exit_layer") or max(1, self.decoder.depth // 4)
            # Layers that were not trained to exit are seldom right, and know it.
            length = draft_length(
                8 if tokens is None else tokens, 0.5 if confidence is None else confidence
            )
            return SelfSpeculative(self.decoder, layer, None, length, name="early-exit")
        if strategy != "imitation":
            raise InputError(f"The strategies are {', '.join(STRATEGIES)}; got {strategy!r}.")
        if self.network is None:
            raise InputError("The strategy 'imitation' needs a draft; load the model with one.")
        config = self.network.config
        length = draft_length(
            config.num_speculative_tokens if tokens is None else tokens,
            config.confidence if confidence is None else confidence,
        )
        return SelfSpeculative(self.decoder, config.exit_layer, self.network, length)
