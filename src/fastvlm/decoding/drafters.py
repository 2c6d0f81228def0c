"""The strategies by name, for a model and its draft."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypedDict, Unpack
from weakref import WeakKeyDictionary

from fastvlm.decoding.skipping import SkippedLayers, skipped_by_default
from fastvlm.decoding.strategies import Autoregressive, Drafter, PromptLookup, SelfSpeculative
from fastvlm.drafting.adaptive import AdaptiveLength
from fastvlm.drafting.draft_length import ConfidenceLength, DraftLength, FixedLength
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder

MAX_DRAFT = 24
"""The most tokens in a draft, where neither the caller nor the draft says another number."""
MAX_LOOKUP = 10
"""The same for `lookup`."""
STRATEGIES = ("autoregressive", "imitation", "early-exit", "skip", "lookup")


class DraftOptions(TypedDict, total=False):
    """How drafts are made.

    Args:
        num_speculative_tokens: The most tokens in a draft; if not given, what the draft records,
            and where it records nothing, 24 (for `lookup`: 10).
        confidence: The drafter's own probability below which a draft ends; 0 for drafts of fixed
            length. If not given, what the draft records; where it records nothing, drafts adapt to
            what is accepted and to what this machine takes, see `AdaptiveLength`.
        exit_layer: For `early-exit`: the layers that draft; a quarter of them, if not given.
        skipped_layers: For `skip`: the layers that don't draft, counted from 0, as
            `find_skipped_layers` finds them; if not given, every second one of the middle half.
    """

    num_speculative_tokens: int | None
    confidence: float | None
    exit_layer: int | None
    skipped_layers: Iterable[int] | None


class Drafters:
    """Makes the ways of drafting for a model, and keeps what adaptive drafts have learnt.

    Args:
        decoder: The target.
        network: Its imitation network, if there is one.
    """

    def __init__(self, decoder: SplitDecoder, network: ImitationNetwork | None = None) -> None:
        self.decoder, self.network = decoder, network
        self._adaptive: WeakKeyDictionary[object, dict[Hashable, AdaptiveLength]]
        self._adaptive = WeakKeyDictionary()

    def make(
        self,
        strategy: str | None = None,
        *,
        network: ImitationNetwork | None = None,
        **options: Unpack[DraftOptions],
    ) -> Drafter:
        """Return a way of drafting.

        Args:
            strategy: One of `STRATEGIES`; None for `imitation` where there is a draft, and for
                `autoregressive` where there is none.
            network: The network to draft with, if not the model's own draft.
            options: See `DraftOptions`.

        Raises:
            InputError: The strategy is unknown, needs a draft that isn't there, or an option is
                out of range.
        """
        network = network or self.network
        strategy = strategy or ("autoregressive" if network is None else "imitation")
        tokens, confidence = options.get("num_speculative_tokens"), options.get("confidence")
        depth = self.decoder.depth
        if strategy == "autoregressive":
            return Autoregressive()
        if strategy == "lookup":
            return PromptLookup(MAX_LOOKUP if tokens is None else tokens)
        if strategy == "early-exit":
            layer = options.get("exit_layer") or max(1, depth // 4)
            length = self.draft_length(self.decoder, layer, tokens, confidence)
            return SelfSpeculative(self.decoder, layer, None, length, name="early-exit")
        if strategy == "skip":
            given = options.get("skipped_layers")
            skipped = tuple(sorted(set(skipped_by_default(depth) if given is None else given)))
            length = self.draft_length(self.decoder, skipped, tokens, confidence)
            return SkippedLayers(self.decoder, skipped, length)
        if strategy != "imitation":
            raise InputError(f"The strategies are {', '.join(STRATEGIES)}; got {strategy!r}.")
        if network is None:
            raise InputError("The strategy 'imitation' needs a draft; load the model with one.")
        config = network.config
        length = self.draft_length(
            network,
            config.exit_layer,
            config.num_speculative_tokens if tokens is None else tokens,
            config.confidence if confidence is None else confidence,
        )
        return SelfSpeculative(self.decoder, config.exit_layer, network, length)

    def draft_length(
        self, owner: object, layers: Hashable, maximum: int | None, confidence: float | None
    ) -> DraftLength:
        """Return how long drafts go on.

        What adaptive drafts have learnt about a drafter is kept from one request to the next.

        Args:
            owner: What drafts: a network, or the target itself.
            layers: Which layers of the target draft.
            maximum: The most tokens in a draft; None for the usual maximum.
            confidence: As for `make`; None for drafts that adapt.

        Raises:
            InputError: The maximum or the confidence is out of range.
        """
        maximum = MAX_DRAFT if maximum is None else maximum
        if confidence is not None:
            return ConfidenceLength(maximum, confidence) if confidence else FixedLength(maximum)
        known = self._adaptive.setdefault(owner, {})
        if (layers, maximum) not in known:
            known[layers, maximum] = AdaptiveLength(maximum)
        return known[layers, maximum]
