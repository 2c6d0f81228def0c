"""The positions that a pass computes, and what its rows see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class CrossKeyValues(NamedTuple):
    """A layer's keys and values of an encoder's states: (batch, heads, source, head_dim) each."""

    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class EncoderContext:
    """What a pass of an encoder-decoder attends to beside its own positions.

    Args:
        states: The encoder's last states, padded: (batch, source, d_model).
        visible: Which of them are a row's own: (batch, source).
        cross: Each layer's keys and values of them, from its first pass on.
        on_cross: Told of a layer's new keys and values.
    """

    states: Tensor
    visible: Tensor
    cross: dict[int, CrossKeyValues] = field(default_factory=dict)
    on_cross: Callable[[int, CrossKeyValues], None] | None = None

    @classmethod
    def of(cls, rows: Sequence[Tensor | None]) -> EncoderContext | None:
        """Return the context of rows, (source, d_model) each; None where no row has any."""
        known = [row for row in rows if row is not None]
        if not known:
            return None
        padded = [known[0].new_zeros(0, known[0].shape[1]) if row is None else row for row in rows]
        lengths = torch.tensor([len(row) for row in padded], device=known[0].device)
        states = pad_sequence(padded, batch_first=True)
        counted = torch.arange(states.shape[1], device=states.device)
        return cls(states, counted < lengths[:, None])

    def put(self, layer: int, found: CrossKeyValues) -> None:
        """Keep a layer's keys and values."""
        self.cross[layer] = found
        if self.on_cross is not None:
            self.on_cross(layer, found)


@dataclass(slots=True)
class Positions:
    """The positions that one pass computes: `width` of them in each row, from `starts` on.

    Args:
        slots: The slot of the cache that each row is.
        starts: The first position of each row.
        width: Positions in each row.
        end: Keys from this position on are not read; none of them is a row's own.
        indices: The positions as a tensor: (batch, width).
        aligned: Whether all rows start at the same position.
        position_ids: Time, height and width of the positions, (3, batch, width), where a row has
            such; None where all three are the position itself.
        prompt_lengths: Positions of each row's prompt, on which some rotations depend.
        encoder: What an encoder-decoder attends to; None for any other model.
        tables: What a decoder keeps from pass to pass, by its own names; it belongs to the cache.
    """

    slots: list[int]
    starts: list[int]
    width: int
    end: int
    indices: Tensor
    aligned: bool
    position_ids: Tensor | None = None
    prompt_lengths: Sequence[int] = ()
    encoder: EncoderContext | None = None
    tables: dict[str, Any] | None = None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _rows: Tensor | None = None

    @classmethod
    def whole(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        position_ids: Sequence[Tensor | None] = (),
        encoder_states: Sequence[Tensor | None] = (),
    ) -> Positions:
        """Return all positions of rows that are computed in one pass, padded on the right.

        Args:
            lengths: Of each row.
            device: Where to.
            position_ids: Of each row's prompt, see `DecoderInputs`; what follows counts on.
            encoder_states: Of each row: (source, d_model).
        """
        rows, width = len(lengths), max(lengths)
        indices = torch.arange(width, device=device).expand(rows, width)
        return cls(
            slots=list(range(rows)),
            starts=[0] * rows,
            width=width,
            end=width,
            indices=indices,
            aligned=True,
            position_ids=own_position_ids(position_ids, indices),
            prompt_lengths=lengths,
            encoder=EncoderContext.of(encoder_states),
        )

    def rows(self, device: torch.device) -> Tensor:
        """Return the slots as a tensor, made once for a pass: (batch, 1)."""
        if self._rows is None or self._rows.device != device:
            self._rows = torch.tensor(self.slots, device=device)[:, None]
        return self._rows

    def mask(self, window: int | None = None) -> Tensor | None:
        """Return which keys each position sees, as `visible`, or None for causal.

        None means that the usual causal rule is right: a pass from position 0, or one position at
        the end of equally long rows.

        Args:
            window: Positions that a sliding-window layer sees, its own included; None for all.
        """
        if window not in self._masks:
            within = window is None or self.end <= window
            last = self.end == self.starts[0] + self.width
            causal = self.aligned and within and last and (self.width == 1 or self.starts[0] == 0)
            self._masks[window] = None if causal else self.visible(None if within else window)
        return self._masks[window]

    @property
    def distances(self) -> Tensor:
        """How far keys lie before each position: (batch or, if aligned, 1, width, end)."""
        here = self.indices[:1] if self.aligned else self.indices
        return here[..., None] - torch.arange(self.end, device=here.device)

    def visible(self, window: int | None = None) -> Tensor:
        """Return which keys each position sees: (batch, 1, width, end).

        Args:
            window: Positions that a sliding-window layer sees, its own included; None for all.
        """
        keys = torch.arange(self.end, device=self.indices.device)
        here = self.indices[:, None, :, None]
        seen = keys <= here
        return seen if window is None else seen & (keys > here - window)


def own_position_ids(prompts: Sequence[Tensor | None], indices: Tensor) -> Tensor | None:
    """Return time, height and width of positions, (3, batch, width); None for the positions alone.

    Args:
        prompts: Of each row's prompt, (3, length); None for 0, 1, 2 ... A reply's positions count
            on from the greatest of its prompt's.
        indices: The positions: (batch, width).
    """
    if not any(prompt is not None for prompt in prompts):
        return None
    found = indices.expand(3, *indices.shape).clone()
    for row, prompt in enumerate(prompts):
        if prompt is not None:
            length, here = prompt.shape[1], indices[row]
            after = here - length + prompt.max() + 1
            inside = prompt[:, here.clamp(max=length - 1)]
            found[:, row] = torch.where(here < length, inside, after)
    return found
