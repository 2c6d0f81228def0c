"""Self-speculative decoding: first layers, an imitation network and the shared LM head draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.draft_loop import Draft, StepTokens, draft_loop
from fastvlm.decoding.lookup import Lookup
from fastvlm.decoding.strategies import RuledDrafting
from fastvlm.drafting.draft_length import DraftLength, FixedLength
from fastvlm.drafting.estimates import Mean
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.placement import moved
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftPath, Draws
from fastvlm.language.positions import Positions

AHEAD = (1, 2, 4, 6, 8)
"""How many draft steps are run at once, where a runtime can."""


class DraftSetup(NamedTuple):
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
    usual_steps: Mean = field(init=False, default_factory=lambda: Mean(value=2))
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
        steps = DraftSteps(self, batch)
        draft = draft_loop(batch, self.length, limits, steps.run, self.lookup, steps.ahead)
        drafted = 0 if draft.progress is None else draft.progress.steps
        # A step that was dropped has seen the last token that was kept, and then others.
        draft.computed = min(steps.computed, drafted + 1)
        if len(steps.states) == draft.computed and steps.states:
            draft.hidden = torch.cat(steps.states, 1)
        if drafted:
            self.usual_steps.add(drafted)
        return draft

    def setup(self) -> DraftSetup:
        """Return what draft steps run, as model and network are now."""
        network, vocabulary, rows = self._placed_network(), None, None
        if network is not None and network.draft_vocabulary is not None:
            rows, vocabulary = self._vocabulary_rows(network, network.draft_vocabulary)
        blocks = [] if network is None else list(network.layers)
        mlp = None if network is None else network.mlp
        return DraftSetup(network, DraftPath(self.exit_layer, blocks, mlp, rows, vocabulary))

    def is_behind(self, network: ImitationNetwork, batch: Batch) -> bool:
        """Return whether the network is to see more, at the first step, than the last tokens."""
        if not self.cache_layers:
            return False
        self._catch_up(network, batch)
        return any(slot.lag for slot in batch.slots)

    def first_step(
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

    def _vocabulary_rows(
        self, network: ImitationNetwork, vocabulary: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return the LM head's rows that draft, if it has rows, and the tokens they are for."""
        weight: Any = getattr(self.decoder.lm_head, "weight", None)
        if type(weight) is not nn.Parameter or weight.is_inference():
            state = None
        else:
            state = (weight, weight._version, weight.data_ptr(), weight.dtype, vocabulary)
        known = _rows.get(network)
        if state is None or known is None or not _same(known[0], state):
            size = self.decoder.vocabulary_size
            kept = vocabulary[vocabulary < size]
            rows = self.decoder.lm_head_rows(kept)
            if rows is None:
                return None, kept
            known = _rows[network] = state, rows.contiguous(), kept
        return known[1], known[2]


_rows: WeakKeyDictionary[ImitationNetwork, tuple[Any, Tensor, Tensor]] = WeakKeyDictionary()
"""The LM head's rows of each draft's vocabulary, and that: for the weights that stand first. What
is made of rows is known by where they lie, so all strategies of a draft share them."""


class DraftSteps:
    """The draft steps of one cycle.

    Args:
        strategy: What drafts.
        batch: The rows.
    """

    def __init__(self, strategy: SelfSpeculative, batch: Batch) -> None:
        self.strategy, self.batch = strategy, batch
        self.states: list[Tensor] = []
        """The exit layer's states of each step that was run alone."""
        self.computed = 0
        """Positions that steps have computed, those ahead of the rule included."""
        self._starts = batch.lengths

    @cached_property
    def _can_go_ahead(self) -> bool:
        """Whether several steps may be run at once, whose exit layers the verify computes anew."""
        batch = self.batch
        simple = all(sampler.draws_simply for sampler in batch.samplers)
        return simple and batch.verify_width is None

    def run(self, last: list[int], number: int) -> tuple[Tensor, Tensor | None]:
        """Run a step. See `DraftStep`."""
        batch, decoder = self.batch, self.strategy.decoder
        network, path = self.setup
        behind = not number and network is not None and self.strategy.is_behind(network, batch)
        if behind and decoder.recomputes and min(map(len, batch.replies)) > 1:
            # With the token before, whose states are known, it is one graph like any other.
            tokens = [reply[-2:] for reply in batch.replies]
        else:
            tokens = [[token] for token in last]
        width = len(tokens[0])
        positions = batch.positions([start + number + 1 - width for start in self._starts], width)
        x = batch.embed(tokens)
        if network is not None and behind and width == 1:
            hidden, logits = self.strategy.first_step(network, batch, (x, positions), path.rows)
        else:
            hidden, logits = decoder.draft_step(x, positions, batch.cache, path)
        self.states.append(hidden[:, -1:])
        self.computed += 1
        logits = logits[:, -1]
        if path.rows is None and path.tokens is not None:
            logits = logits[:, path.tokens]
        return logits, path.tokens

    def ahead(self, last: list[int], number: int, most: int) -> list[StepTokens] | None:
        """Run several steps at once, if the decoder can. See `Ahead`."""
        batch, drafter, behind = self.batch, self.strategy.decoder.ahead, None
        path = self.setup.path
        if drafter is None or path.tokens is None or not self._can_go_ahead:
            return None
        if not number and any(slot.lag for slot in batch.slots):
            if len(batch.slots) > 1:
                # Attention takes several positions of one row alone.
                return None
            [slot] = batch.slots
            assert slot.exits is not None  # it is them that the network has not seen
            behind = slot.exits.since(slot.drafted_length)[None]
        # About as many as are mostly drafted: one that is dropped cost little. A draft that is
        # longer than most goes on, and the longer it is already, the further.
        least = drafter.least(path, number)
        usual = max(self.strategy.usual_steps.value - number, number // 2, least)
        possible = (one for one in AHEAD if one <= most)
        steps = min(possible, key=lambda one: abs(one - usual))
        before = 0 if behind is None else behind.shape[1]
        positions = batch.positions([s + number - before for s in self._starts], before + steps)
        draws = self._draws(number, steps, path.tokens)
        found = drafter.draft_ahead(last, positions, batch.cache, path, behind, draws)
        self.computed += len(found or ())
        return found

    def _draws(self, number: int, steps: int, tokens: Tensor) -> Draws | None:
        """Return how steps draw their tokens; None where all rows take the best ones."""
        batch, size = self.batch, self.strategy.decoder.vocabulary_size
        if all(sampler.is_greedy for sampler in batch.samplers):
            return None
        noise = [
            sampler.noise(len(reply) + number, steps, tokens, size)
            for sampler, reply in zip(batch.samplers, batch.replies, strict=True)
        ]
        temperatures = [sampler.temperature or 1.0 for sampler in batch.samplers]
        return Draws(torch.tensor(temperatures), torch.stack(noise, 1))

    @cached_property
    def setup(self) -> DraftSetup:
        """What the steps run. Where a rule drafts nothing, nobody asks."""
        return self.strategy.setup()


def _same(one: tuple[Any, ...] | None, other: tuple[Any, ...]) -> bool:
    """Return whether two states of an LM head are the same; their tensors are compared by id."""
    return one is not None and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )
