"""A slot of the engine: a request and its state while it decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlm.decoding.history import History
from fastvlm.decoding.request import Request
from fastvlm.language.decoder_inputs import DecoderInputs


class ExitStates:
    """The exit layer's hidden states of a slot's positions, from which a network fills its cache.

    Args:
        kept: Whether all states are kept, or only those that the network has not seen.
    """

    def __init__(self, *, kept: bool) -> None:
        self.kept = kept
        self.length = 0
        """Positions whose states have come."""
        self._parts: list[tuple[int, Tensor]] = []

    def append(self, states: Tensor) -> None:
        """Take the states of the next positions: (positions, d_model)."""
        self._parts.append((self.length, states))
        self.length += len(states)

    def since(self, position: int) -> Tensor:
        """Return the states of all positions from one on: (positions, d_model)."""
        found = [states[max(position - start, 0) :] for start, states in self._parts]
        found = [states for states in found if len(states)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def forget(self, position: int) -> None:
        """Drop the states of positions before one, unless all are kept."""
        if not self.kept:
            while self._parts and self._parts[0][0] + len(self._parts[0][1]) <= position:
                self._parts.pop(0)


@dataclass(slots=True, eq=False)
class Slot:
    """A row of the cache, and the request that occupies it.

    Args:
        index: The row's number in the cache.
        request: The request.
        exits: The exit layer's states, for a strategy whose network has a cache of its own.
        prefilled: Positions of the prompt that are computed.
        length: Committed positions, whose keys and values are final.
        drafted_length: The number of these that the imitation network's layers hold, which may be
            any number lower.
        history: The request's tokens, for a strategy that looks earlier ones up.
        restart: The length at which all positions are computed anew, see `SplitDecoder.restart`;
            None for never, or where it has happened.
        restarted: The prompt and the reply so far, as they were then.
    """

    index: int
    request: Request
    exits: ExitStates | None = None
    prefilled: int = 0
    length: int = 0
    drafted_length: int = 0
    history: History | None = None
    restart: int | None = None
    restarted: DecoderInputs | None = None

    @property
    def inputs(self) -> DecoderInputs:
        """What is computed before the reply goes on."""
        return self.request.inputs if self.restarted is None else self.restarted

    @property
    def decodes(self) -> bool:
        """Whether the prompt is computed, so that the reply goes on."""
        return self.prefilled == len(self.inputs)

    @property
    def last(self) -> int:
        """The last committed token, which the cache doesn't hold yet."""
        return self.request.output_token_ids[-1]

    @property
    def lag(self) -> int:
        """Positions before the last token that the imitation network has not seen."""
        return 0 if self.exits is None else self.length - self.drafted_length

    @property
    def room(self) -> int:
        """The most tokens of a draft: of the reply's limit, one is left for the target's own."""
        left = self.request.max_new_tokens - len(self.request.output_token_ids) - 1
        return left if self.restart is None else min(left, self.restart - 1 - self.length)
