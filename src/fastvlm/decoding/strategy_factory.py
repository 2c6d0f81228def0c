"""The strategies by name, for a model and its draft."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from threading import Lock
from typing import Any, NamedTuple

from fastvlm.decoding.layer_skip import LayerSkip, default_skipped_layers
from fastvlm.decoding.lookup import Lookup
from fastvlm.decoding.self_speculative import SelfSpeculative
from fastvlm.decoding.strategies import (
    Autoregressive,
    PromptLookup,
    Strategy,
)
from fastvlm.drafting.adaptive import AdaptiveLength
from fastvlm.drafting.draft_length import ConfidenceLength, DraftLength, FixedLength
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.options import refuse_unknown
from fastvlm.language.decoder import SplitDecoder

MAX_DRAFT_TOKENS = 24
"""The default maximum number of tokens in a draft."""
STRATEGY_OPTIONS = {
    "autoregressive": (),
    "imitation": ("num_speculative_tokens", "confidence"),
    "cascade": ("num_speculative_tokens", "confidence"),
    "early-exit": ("num_speculative_tokens", "confidence", "exit_layer"),
    "layer-skip": ("num_speculative_tokens", "confidence", "skipped_layers"),
    "prompt-lookup": ("num_speculative_tokens", "confidence"),
}
"""The strategies, and the options that each of them takes."""
WITH_DRAFT, WITHOUT_DRAFT = "cascade", "autoregressive"
"""The default strategy of a model with a draft, and of one without."""


class StrategyFactory:
    """Makes a model's strategies, and returns the same object when the same is asked for again.

    So requests with equal options are decoded together, and share the estimates of adaptive drafts.
    It may be used from any thread.

    Args:
        decoder: The target.
        network: The target's imitation network, if there is one.
    """

    def __init__(self, decoder: SplitDecoder, network: ImitationNetwork | None = None) -> None:
        self.decoder, self.network = decoder, network
        self._made: dict[tuple[Hashable, ...], Strategy] = {}
        self._lock = Lock()

    def make(
        self, name: str | None = None, *, network: ImitationNetwork | None = None, **options: Any
    ) -> Strategy:
        """Return a strategy.

        Args:
            name: One of `STRATEGY_OPTIONS`; None for `cascade` where there is a draft, and for
                `autoregressive` where there is none.
            network: The network to draft with, if not the model's own draft.
            options: Those of `STRATEGY_OPTIONS` that the strategy takes; None is the default.

                num_speculative_tokens: The maximum number of tokens in a draft. The default is the
                    draft's own setting, and without one 24.
                confidence: The drafter's own probability below which a draft ends; 0 for drafts of
                    fixed length. The default is the draft's own setting; without one, drafts adapt
                    to the acceptance rate and to this machine, see `AdaptiveLength`.
                exit_layer: The number of layers that draft; a quarter of them by default.
                skipped_layers: The layers that don't draft, counted from 0, as
                    `find_skipped_layers` finds them; by default every second one of the middle
                    half.

        Raises:
            InputError: The strategy is unknown, needs a draft that isn't there, doesn't take an
                option, or an option is out of range.
        """
        network = network or self.network
        name = name or (WITHOUT_DRAFT if network is None else WITH_DRAFT)
        if name not in STRATEGY_OPTIONS:
            raise InputError(f"The strategies are {', '.join(STRATEGY_OPTIONS)}; got {name!r}.")
        given = {option: value for option, value in options.items() if value is not None}
        refuse_unknown(given, STRATEGY_OPTIONS[name], f"{name!r} takes")
        recipe = _STRATEGY_RECIPES[name](self.decoder, network, given)
        with self._lock:
            if recipe.key not in self._made:
                self._made[recipe.key] = recipe.build()
            return self._made[recipe.key]

    def replace_network(self, network: ImitationNetwork) -> None:
        """Draft with another network from now on; requests that decode go on with their own."""
        with self._lock:
            before, self.network = self.network, network
            self._made = {
                key: made
                for key, made in self._made.items()
                if before is None or not any(part is before for part in key)
            }

    def chosen(self, strategy: Strategy | str | None) -> Strategy:
        """Return a strategy, or the one of a name; see `make`."""
        return self.make(strategy) if strategy is None or isinstance(strategy, str) else strategy


class _Recipe(NamedTuple):
    """What tells a strategy from others, and what builds it."""

    key: tuple[Hashable, ...]
    build: Callable[[], Strategy]


def _autoregressive(*_: Any) -> _Recipe:
    return _Recipe(("autoregressive",), Autoregressive)


def _lookup(_: SplitDecoder, __: ImitationNetwork | None, given: dict[str, Any]) -> _Recipe:
    most, confidence = given.get("num_speculative_tokens"), given.get("confidence")
    return _Recipe(
        ("prompt-lookup", most, confidence), lambda: PromptLookup(draft_length(most, confidence))
    )


def _early_exit(
    decoder: SplitDecoder, _: ImitationNetwork | None, given: dict[str, Any]
) -> _Recipe:
    layer: int = given.get("exit_layer", max(1, decoder.depth // 4))
    most, confidence = given.get("num_speculative_tokens"), given.get("confidence")
    return _Recipe(
        ("early-exit", layer, most, confidence),
        lambda: SelfSpeculative(
            decoder, layer, None, draft_length(most, confidence), name="early-exit"
        ),
    )


def _layer_skip(
    decoder: SplitDecoder, _: ImitationNetwork | None, given: dict[str, Any]
) -> _Recipe:
    listed: Iterable[int] = given.get("skipped_layers", default_skipped_layers(decoder.depth))
    skipped = tuple(sorted(set(listed)))
    most, confidence = given.get("num_speculative_tokens"), given.get("confidence")
    return _Recipe(
        ("layer-skip", skipped, most, confidence),
        lambda: LayerSkip(decoder, skipped, draft_length(most, confidence)),
    )


def _imitation(
    decoder: SplitDecoder,
    network: ImitationNetwork | None,
    given: dict[str, Any],
    lookup: Lookup | None = None,
) -> _Recipe:
    name = "imitation" if lookup is None else "cascade"
    if network is None:
        raise InputError(f"The strategy {name!r} needs a draft; load the model with one.")
    config = network.config
    most = given.get("num_speculative_tokens", config.num_speculative_tokens)
    confidence = given.get("confidence", config.confidence)
    shown = name if config.kind == "block" else f"{name}-{config.kind}"
    return _Recipe(
        (name, network, config.exit_layer, most, confidence),
        lambda: SelfSpeculative(
            decoder, config.exit_layer, network, draft_length(most, confidence), lookup, shown
        ),
    )


def _cascade(
    decoder: SplitDecoder, network: ImitationNetwork | None, given: dict[str, Any]
) -> _Recipe:
    return _imitation(decoder, network, given, Lookup())


_STRATEGY_RECIPES: dict[
    str, Callable[[SplitDecoder, ImitationNetwork | None, dict[str, Any]], _Recipe]
] = {
    "autoregressive": _autoregressive,
    "imitation": _imitation,
    "cascade": _cascade,
    "early-exit": _early_exit,
    "layer-skip": _layer_skip,
    "prompt-lookup": _lookup,
}


def draft_length(maximum: int | None, confidence: float | None) -> DraftLength:
    """Return the rule for the draft length.

    Args:
        maximum: The maximum number of tokens in a draft; None for `MAX_DRAFT_TOKENS`.
        confidence: The probability below which a draft ends, 0 for drafts of fixed length; None for
            drafts that adapt.

    Raises:
        InputError: A value is out of range.
    """
    maximum = MAX_DRAFT_TOKENS if maximum is None else maximum
    if confidence is None:
        return AdaptiveLength(maximum)
    return ConfidenceLength(maximum, confidence) if confidence else FixedLength(maximum)
