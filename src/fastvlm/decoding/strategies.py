"""The strategies: ways of drafting that share one engine. None holds a request's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.draft_loop import Draft, draft_loop
from fastvlm.decoding.lookup import Lookup
from fastvlm.drafting.draft_length import DraftLength, FixedLength
from fastvlm.drafting.estimates import Mean
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.placement import moved
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath
from fastvlm.language.positions import Positions

AHEAD = (8, 4, 2, 1)
"""How many draft steps are run at once, where a runtime can."""
MIN_AHEAD = 2
"""Steps that are run at once where fewer are usual, if there is room: the second costs little."""


class Strategy(Protocol):
    """A way of drafting.

    One strategy may serve any number of requests at once, so the state of each request is in its
    slot.
    """

    @property
    def name(self) -> str:
        """The strategy's name in tables."""
        ...

    @property
    def exit_layer(self) -> int:
        """Layers of the target that drafting runs (k); 0 for a strategy that runs none."""
        ...

    @property
    def cache_layers(self) -> int:
        """Layers that the strategy adds to the cache."""
        ...

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens of a draft."""
        ...

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """Propose tokens to follow each row's last one.

        Args:
            batch: The slots, a row each.
            limits: The maximum number of tokens to draft for each row.
        """
        ...

    def on_verified(self, draft: Draft, accepted: Sequence[int], now: float) -> None:
        """Update the strategy's estimates after a verify.

        Args:
            draft: The draft.
            accepted: The number of drafted tokens that each row accepted.
            now: When the verify ended, in seconds of the batch's clock.
        """
        ...

    def on_finish(self, tokens: int) -> None:
        """Update the strategy's estimates after a reply of so many tokens."""
        ...


class Drafting:
    """A strategy that keeps no estimates."""

    def on_verified(self, draft: Draft, accepted: Sequence[int], now: float) -> None:
        """Do nothing. See `Strategy.on_verified`."""

    def on_finish(self, tokens: int) -> None:
        """Do nothing. See `Strategy.on_finish`."""


class RuledDrafting:
    """A strategy whose draft length is decided by a rule, which adapts to what is accepted."""

    length: DraftLength

    def on_verified(self, draft: Draft, accepted: Sequence[int], now: float) -> None:
        """Update the rule for the draft length. See `Strategy.on_verified`."""
        progress = draft.progress
        if progress is None or (draft.forced and not progress.tokens):
            # With forced tokens alone it was neither a draft of this drafter nor an ordinary step.
            return
        # A drafter's own tokens, and copied ones, come before the forced ones.
        own = [
            min(count, len(drafted) + len(copied))
            for count, drafted, copied in zip(
                accepted, progress.confidences, progress.copied, strict=True
            )
        ]
        self.length.update(progress, own, draft.timings(now))

    def on_finish(self, tokens: int) -> None:
        """Update the rule for the draft length. See `Strategy.on_finish`."""
        self.length.on_finish(tokens)


@dataclass(frozen=True, eq=False)
class Autoregressive(Drafting):
    """No draft: one pass of the whole model for each token.

    Args:
        exit_layer: Layers that run in a pass of their own, as they do with a strategy that drafts.
    """

    exit_layer: int = 0
    name: str = "autoregressive"
    cache_layers: int = 0
    max_draft_tokens: int = 0

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:  # noqa: ARG002
        """Propose nothing."""
        return Draft([[] for _ in batch.slots])


@dataclass(eq=False)
class PromptLookup(RuledDrafting):
    """Propose the tokens that followed an earlier occurrence of the last tokens (Saxena 2023).

    Args:
        length: The rule for the draft length.
        lookup: What looks for earlier occurrences.
        name: The strategy's name in tables.
    """

    length: DraftLength = field(default_factory=lambda: FixedLength(10))
    lookup: Lookup = field(default_factory=Lookup)
    name: str = "prompt-lookup"
    exit_layer: int = field(init=False, default=0)
    cache_layers: int = field(init=False, default=0)

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens of a draft."""
        return self.length.maximum

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """Propose the tokens that followed the longest and latest earlier occurrence."""
        return draft_loop(batch, self.length, limits, None, self.lookup)


class _DraftSetup(NamedTuple):
    """What draft steps run: the network, and where they run it."""

    network: ImitationNetwork | None
    path: DraftPath


@dataclass(eq=False)
class SelfSpeculative(RuledDrafting):
    """Draft with the target's first layers, an imitation network and the shared LM head.

    (FastVLM, Bajpai and Hanawal, arXiv 2510.22641, section 3.) Without a network this is early
    exit: the final norm and LM head on the exit layer's states.

    Args:
        decoder: The target.
        exit_layer: Layers of the target that draft (k).
        network: The imitation network; None for early exit.
        length: The rule for the draft length.
        lookup: What looks for tokens to copy where they promise more than drafting (a cascade, as
            in arXiv 2312.11462); None for none.
        name: The strategy's name in tables.

    Raises:
        InputError: The target has no such exit layer.
    """

    decoder: SplitDecoder
    exit_layer: int
    network: ImitationNetwork | None = None
    length: DraftLength = field(default_factory=FixedLength)
    lookup: Lookup | None = None
    name: str = "imitation"
    _rows: tuple[Any, Tensor, Tensor] | None = field(init=False, default=None)
    """The LM head's rows of the draft's vocabulary, and that: for the weights that stand first."""
    _usual_steps: Mean = field(init=False, default_factory=lambda: Mean(value=MIN_AHEAD))
    """Steps of a draft that has any."""

    def __post_init__(self) -> None:
        """Check the exit layer."""
        if not 1 <= self.exit_layer < self.decoder.depth:
            raise InputError(
                f"The exit layer lies between 1 and {self.decoder.depth - 1} for this model;"
                f" got {self.exit_layer}."
            )

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens of a draft."""
        return self.length.maximum

    @property
    def cache_layers(self) -> int:
        """Layers that the strategy adds to the cache."""
        return 0 if self.network is None else self.network.cache_layers

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """Draft token by token, until the rule for the draft's length ends it."""
        starts = batch.lengths
        states: list[Tensor] = []
        setup: _DraftSetup | None = None
        behind, computed = False, 0

        def step(last: list[int], number: int) -> tuple[Tensor, Tensor | None]:
            nonlocal computed
            network, path = set_up(number)
            if behind and self.decoder.recomputes and min(map(len, batch.replies)) > 1:
                # With the token before, whose states are known, it is one graph like any other.
                tokens = [reply[-2:] for reply in batch.replies]
            else:
                tokens = [[token] for token in last]
            width = len(tokens[0])
            positions = batch.positions([start + number + 1 - width for start in starts], width)
            x = batch.embed(tokens)
            if network is not None and behind and width == 1:
                hidden, logits = self._first_step(network, batch, (x, positions), path.rows)
            else:
                hidden, logits = self.decoder.draft_step(x, positions, batch.cache, path)
            states.append(hidden[:, -1:])
            computed += 1
            logits = logits[:, -1]
            if path.rows is None and path.tokens is not None:
                logits = logits[:, path.tokens]
            return logits, path.tokens

        def set_up(number: int) -> _DraftSetup:
            # Where a rule drafts nothing, finding it would be a good part of what a cycle adds.
            nonlocal setup, behind
            setup = setup or self._setup()
            network = setup.network
            behind = not number and network is not None and self._is_behind(network, batch)
            return setup

        def ahead(last: int, number: int, most: int) -> list[tuple[int, float]] | None:
            nonlocal computed
            path = set_up(number).path
            if behind:
                return None
            # As many as are mostly drafted: one that is dropped cost little.
            usual = max(self._usual_steps.value - number, MIN_AHEAD)
            steps = next(one for one in AHEAD if one <= min(usual, most))
            positions = batch.positions([starts[0] + number], steps)
            found = self.decoder.draft_ahead(last, positions, batch.cache, path)
            computed += len(found or ())
            return found

        alone = len(batch.slots) == 1 and batch.samplers[0].is_greedy
        chained = self.decoder.recomputes and alone and batch.verify_width is None
        draft = draft_loop(
            batch, self.length, limits, step, self.lookup, ahead if chained else None
        )
        steps = 0 if draft.progress is None else draft.progress.steps
        # A step that was dropped has seen the last token that was kept, and then others.
        draft.computed = min(computed, steps + 1)
        if len(states) == draft.computed and states:
            draft.hidden = torch.cat(states, 1)
        if steps:
            self._usual_steps.add(steps)
        return draft

    def _setup(self) -> _DraftSetup:
        """Return what draft steps run, as model and network are now."""
        network, vocabulary, rows = self._placed_network(), None, None
        if network is not None and network.draft_vocabulary is not None:
            rows, vocabulary = self._vocabulary_rows(network.draft_vocabulary)
        blocks = [] if network is None else list(network.layers)
        mlp = None if network is None else network.mlp
        return _DraftSetup(network, DraftPath(self.exit_layer, blocks, mlp, rows, vocabulary))

    def _is_behind(self, network: ImitationNetwork, batch: Batch) -> bool:
        """Return whether the network is to see more, at the first step, than the last tokens."""
        if not self.cache_layers:
            return False
        self._catch_up(network, batch)
        return any(slot.lag for slot in batch.slots)

    def _first_step(
        self,
        network: ImitationNetwork,
        batch: Batch,
        given: tuple[Tensor, Positions],
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a draft step in which the network sees a token more. See `SplitDecoder.draft_step`.

        Where a whole draft was accepted, its last token goes through the network only now.
        """
        cache, decoder, slots = batch.cache, self.decoder, batch.slots
        exits = decoder.forward_layers(*given, cache, range(self.exit_layer))
        seen = [
            torch.cat((slot.exits.since(slot.drafted_length), exits[row]))
            if slot.exits is not None and slot.lag
            else exits[row]
            for row, slot in enumerate(slots)
        ]
        ragged = pad_sequence(seen, batch_first=True)
        starts = [slot.drafted_length for slot in slots]
        places = batch.positions(starts, ragged.shape[1])
        found = network.imitate(ragged, places, cache, decoder)
        if len(slots) == 1:
            x = found[:, -1:]
        else:
            counted = torch.arange(len(slots), device=found.device)
            lags = torch.tensor([slot.lag for slot in slots], device=found.device)
            x = found[counted, lags][:, None]
        return exits, decoder.head(x) if rows is None else decoder.head_rows(x, rows)

    def _catch_up(self, network: ImitationNetwork, batch: Batch) -> None:
        """Show the network what slots have computed since it last drafted for them.

        Slots that are equally far behind go through it together; one position is left to the first
        draft step, which has room for it.
        """
        behind: dict[int, list[Any]] = {}
        for slot in batch.slots:
            if slot.lag > 1:
                behind.setdefault(slot.lag, []).append(slot)
        for lag, slots in behind.items():
            part = Batch(batch.decoder, batch.cache, slots, batch.clock)
            x = torch.stack([slot.exits.since(slot.drafted_length) for slot in slots])
            positions = part.positions([slot.drafted_length for slot in slots], lag)
            network.imitate(x, positions, batch.cache, self.decoder)
            for slot in slots:
                slot.drafted_length = slot.length
                slot.exits.forget(slot.length)

    def _placed_network(self) -> ImitationNetwork | None:
        """Return the network where and in the precision that hidden states are."""
        if self.network is None:
            return None
        device, dtype = self.decoder.device_and_dtype()
        parameter: nn.Parameter = next(self.network.parameters())
        if (parameter.device, parameter.dtype) != (device, dtype):
            moved(self.network, device, dtype)
        return self.network

    def _vocabulary_rows(self, vocabulary: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the LM head's rows that draft, if it has rows, and the tokens they are for."""
        weight: Any = getattr(self.decoder.lm_head, "weight", None)
        if type(weight) is not nn.Parameter or weight.is_inference():
            state = None
        else:
            state = (weight, weight._version, weight.data_ptr(), weight.dtype, vocabulary)
        if state is None or self._rows is None or not _same(self._rows[0], state):
            size = self.decoder.vocabulary_size
            kept = vocabulary[vocabulary < size]
            rows = self.decoder.lm_head_rows(kept)
            if rows is None:
                return None, kept
            self._rows = state, rows.contiguous(), kept
        return self._rows[1], self._rows[2]


def _same(one: tuple[Any, ...] | None, other: tuple[Any, ...]) -> bool:
    """Return whether two states of an LM head are the same; their tensors are compared by id."""
    return one is not None and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )
