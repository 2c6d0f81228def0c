"""The key/value cache: slots that requests enter and leave, each with a length of its own.

Slots write at their own positions and attend to the keys at positions up to their own. What lies
beyond a slot's length is never attended to, so rolling back a rejected draft is setting a length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.functional.errors import InputError
from fastvlm.language.decoder_inputs import DecoderInputs
from fastvlm.language.layer_storage import BLOCK_POSITIONS, LayerStorage
from fastvlm.language.positions import CrossKeyValues, EncoderContext, Positions


class KeyValueCache(Protocol):
    """What running layers needs of a cache."""

    def begin_pass(self, positions: Positions) -> None:
        """Say where the layers of the next pass write."""
        ...

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values, and return all that its queries may read."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the first position of a pass, as layers ask that count positions themselves."""
        ...


@dataclass(slots=True)
class SlotInputs:
    """What a slot's positions are beside their keys and values."""

    prompt: DecoderInputs | None = None
    cross: dict[int, CrossKeyValues] = field(default_factory=dict)
    """Each layer's keys and values of the encoder's states, from its first pass on."""


class RowInputs(NamedTuple):
    """What the rows of a pass were given, see `Positions`."""

    prompts: Sequence[DecoderInputs | None]
    encoder: EncoderContext | None
    plain: bool


class DecoderCache:
    """Keys and values of every layer, in slots.

    Decoder layers of `transformers` call `update`, as they would on its own caches. A layer's
    memory is taken when it first writes, as its keys are: on its own device, in its own precision.
    Layers past the target's own number belong to an imitation network.

    Args:
        device: Where positions are.
        slots: Slots at first.
        capacity: Positions of each slot at first.
    """

    def __init__(self, device: torch.device, slots: int = 0, capacity: int = 0) -> None:
        self.device = device
        self.capacity = 0
        """Positions of each slot."""
        self.layers: dict[int, LayerStorage] = {}
        self.tables: dict[str, Any] = {}
        """What a decoder keeps from pass to pass, see `Positions`."""
        self.memory: object = object()
        """Stands for where layers lie: another object after they have moved."""
        self._inputs: list[SlotInputs] = []
        self._together: dict[tuple[int, ...], RowInputs] = {}
        """What slots were given that went through a pass together, until one changes hands."""
        self._counted = torch.arange(0, device=device)
        """0, 1, 2 ... for all positions of a slot."""
        self._positions: Positions | None = None
        self.rows: slice | Tensor = slice(0)
        """The slots of the pass: a slice where they lie side by side."""
        self.reserve(slots, capacity)

    @property
    def slots(self) -> int:
        """Slots that there are."""
        return len(self._inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self.layers.values())

    @staticmethod
    def rounded(capacity: int) -> int:
        """Return the positions that a slot of a capacity has: whole blocks."""
        return -(-capacity // BLOCK_POSITIONS) * BLOCK_POSITIONS

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for so many slots of so many positions; there is never less room than before.

        Args:
            slots: Slots in all.
            capacity: Positions of each.
        """
        more = max(slots - self.slots, 0)
        capacity = max(self.capacity, self.rounded(capacity))
        if not more and capacity == self.capacity:
            return
        self._inputs += [SlotInputs() for _ in range(more)]
        self.capacity = capacity
        self._counted = torch.arange(capacity, device=self.device)
        self.memory = object()
        for layer in self.layers.values():
            layer.grow(self.slots, capacity)

    def assign(self, slot: int, prompt: DecoderInputs) -> None:
        """Give a slot to a request.

        Args:
            slot: The slot.
            prompt: What the positions of the prompt are; those of the reply follow them.
        """
        self.release(slot)
        self._inputs[slot] = SlotInputs(prompt)

    def release(self, slot: int) -> None:
        """Forget what a slot holds; nothing of it is ever read again."""
        self._inputs[slot] = SlotInputs()
        self._together.clear()
        for layer in self.layers.values():
            layer.finite[slot] = 0

    def move(self, slot: int, to: int) -> None:
        """Give another slot what a slot holds."""
        for layer in self.layers.values():
            known = layer.finite[slot]
            for tensor in (layer.keys, layer.values):
                tensor[to, :, :known] = tensor[slot, :, :known]
            layer.finite[to] = known
        self._inputs[to] = self._inputs[slot]
        self.release(slot)

    def positions(
        self,
        starts: Sequence[int],
        width: int,
        slots: Sequence[int] | None = None,
        *,
        to_the_end: bool = False,
    ) -> Positions:
        """Return the positions of a pass over `width` of them from each row's start.

        Args:
            starts: The first position of each row.
            width: Positions in each row.
            slots: The slot that each row is; None for all slots.
            to_the_end: Read the whole cache, so that the order in which keys are summed, and with
                it the rounding, does not depend on how far the rows have come.

        Raises:
            InputError: The positions don't fit into the cache.
        """
        rows = list(range(self.slots)) if slots is None else list(slots)
        given = self._together.get(tuple(rows)) or self._given(tuple(rows))
        first = starts[0]
        aligned = set(starts) == {first}
        end = max(starts) + width
        if end > self.capacity:
            raise InputError(
                f"{end} positions are needed, but the cache was made for {self.capacity}."
            )
        if aligned:
            indices = self._counted[first:end].expand(len(rows), width)
        else:
            begun = torch.tensor(starts, device=self.device)[:, None]
            indices = begun + self._counted[:width]
        return Positions(
            slots=rows,
            starts=list(starts),
            width=width,
            end=self.capacity if to_the_end else end,
            indices=indices,
            aligned=aligned,
            prompts=given.prompts,
            encoder=given.encoder,
            tables=self.tables,
            plain=given.plain,
            to_the_end=to_the_end,
        )

    def begin_pass(self, positions: Positions) -> None:
        """Say where the layers of the next pass write."""
        if positions is self._positions:
            return
        self._positions = positions
        first, count = positions.slots[0], len(positions.slots)
        if positions.slots == list(range(first, first + count)):
            self.rows = slice(first, first + count)
        else:
            self.rows = torch.tensor(positions.slots, device=self.device)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and return all that its queries may read.

        Args:
            keys: (batch, kv_heads, width, head_dim).
            values: (batch, kv_heads, width, head_dim).
            layer_idx: The layer.

        Returns:
            Two of (batch, kv_heads, end, head_dim).
        """
        positions = self._positions
        assert positions is not None  # `begin_pass` comes first
        layer = self.layers.get(layer_idx) or self.storage(layer_idx, keys, values)
        return layer.exchange(positions, self.rows, keys, values)

    def note_written(self, positions: Positions, layers: Iterable[int]) -> None:
        """Take note of a pass whose keys and values were written elsewhere than in `update`."""
        for number in layers:
            finite = self.layers[number].finite
            for slot, start in zip(positions.slots, positions.starts, strict=True):
                finite[slot] = max(finite[slot], start + positions.width)

    def storage(self, layer_idx: int, keys: Tensor, values: Tensor) -> LayerStorage:
        """Return a layer's memory, taken now if it has none.

        Args:
            layer_idx: The layer.
            keys: Some of its keys: (any number, kv_heads, any number, head_dim).
            values: Some of its values.
        """
        layer = self.layers.get(layer_idx)
        if layer is None:
            layer = LayerStorage(keys, values, self.slots, self.capacity)
            self.layers[layer_idx] = layer
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (as transformers has it)
        """Return the first position of a pass, as layers ask that count positions themselves.

        Where rows start at different positions it is the first of them.
        """
        return 0 if self._positions is None else min(self._positions.starts)

    def export_slot(self, slot: int, length: int, layers: int) -> dict[int, Tensor]:
        """Return a copy of a slot's beginning.

        Args:
            slot: The slot.
            length: Positions to copy.
            layers: The layers to copy, from the first on; those that hold nothing are left out.

        Returns:
            Keys and values by layer: (2, kv_heads, length, head_dim) each.
        """
        return {
            index: torch.stack((layer.keys[slot, :, :length], layer.values[slot, :, :length]))
            for index, layer in self._first(layers).items()
        }

    def exported_bytes(self, length: int, layers: int) -> int:
        """Return the bytes that `export_slot` would copy."""
        each = self.slots * self.capacity
        return sum(layer.nbytes // each * length for layer in self._first(layers).values())

    def import_slot(self, slot: int, state: Mapping[int, Tensor], length: int) -> None:
        """Write the beginning of what `export_slot` returned to the beginning of a slot."""
        for index, (keys, values) in state.items():
            layer = self.storage(index, keys[None], values[None])
            layer.keys[slot, :, :length] = keys[:, :length]
            layer.values[slot, :, :length] = values[:, :length]
            layer.finite[slot] = length

    def _first(self, number: int) -> dict[int, LayerStorage]:
        return {index: layer for index, layer in self.layers.items() if index < number}

    def _given(self, rows: tuple[int, ...]) -> RowInputs:
        """Return what rows were given, and keep it until a slot changes hands."""
        prompts = [self._inputs[slot].prompt for slot in rows]
        states = [None if prompt is None else prompt.encoder_states for prompt in prompts]
        context = EncoderContext.of(states)
        if context is not None:
            self._fill_cross(context, rows)
        plain = all(prompt is None or prompt.is_plain for prompt in prompts)
        found = self._together[rows] = RowInputs(prompts, context, plain)
        return found

    def _fill_cross(self, context: EncoderContext, rows: tuple[int, ...]) -> None:
        """Give a context what its slots' layers have computed, and keep what they will compute."""
        lengths = context.visible.sum(1).tolist()
        known = set.intersection(*(set(self._inputs[slot].cross) for slot in rows))
        size = context.states.shape[1]
        for layer in known:
            keys, values = (
                [F.pad(tensor, (0, 0, 0, size - tensor.shape[2])) for tensor in own]
                for own in zip(*(self._inputs[slot].cross[layer] for slot in rows), strict=True)
            )
            context.cross[layer] = CrossKeyValues(torch.cat(keys), torch.cat(values))

        def keep(layer: int, found: CrossKeyValues) -> None:
            for row, (slot, length) in enumerate(zip(rows, lengths, strict=True)):
                own = (tensor[row : row + 1, :, :length].clone() for tensor in found)
                self._inputs[slot].cross[layer] = CrossKeyValues(*own)

        context.on_cross = keep
