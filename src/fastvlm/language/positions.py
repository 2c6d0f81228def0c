"""The positions that a pass computes, and what its rows see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlm.language.decoder_inputs import OUTSIDE, DecoderInputs
from fastvlm.language.masks import FULL, MaskKind, in_the_same_block


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

    def of_row(self, row: int) -> EncoderContext:
        """Return what one row attends to; what its layers compute is not kept."""
        one = slice(row, row + 1)
        known = {
            layer: CrossKeyValues(*(part[one] for part in both))
            for layer, both in self.cross.items()
        }
        return EncoderContext(self.states[one], self.visible[one], known)

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
        prompts: The prompt of each row; None for a row that has none.
        encoder: What an encoder-decoder attends to; None for any other model.
        tables: What a decoder keeps from pass to pass, by its own names; it belongs to the cache.
        plain: Whether all prompts are known to be plain, see `DecoderInputs.is_plain`.
        to_the_end: Whether keys are read to the end of the cache, so that rounding is always alike.
    """

    slots: list[int]
    starts: list[int]
    width: int
    end: int
    indices: Tensor
    aligned: bool
    prompts: Sequence[DecoderInputs | None] = ()
    encoder: EncoderContext | None = None
    tables: dict[str, Any] | None = None
    plain: bool = False
    to_the_end: bool = False
    _masks: dict[MaskKind, Tensor | None] = field(default_factory=dict)
    _rows: Tensor | None = None
    _position_ids: tuple[Tensor | None] | None = None
    _blocks: tuple[Tensor | None] | None = None

    @classmethod
    def whole(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        prompts: Sequence[DecoderInputs | None] = (),
    ) -> Positions:
        """Return all positions of rows that are computed in one pass, padded on the right.

        Args:
            lengths: Of each row, its prompt and what follows it.
            device: Where to.
            prompts: Of each row.
        """
        rows, width = len(lengths), max(lengths)
        sources = [None if prompt is None else prompt.encoder_states for prompt in prompts]
        return cls(
            slots=list(range(rows)),
            starts=[0] * rows,
            width=width,
            end=width,
            indices=torch.arange(width, device=device).expand(rows, width),
            aligned=True,
            prompts=prompts,
            encoder=EncoderContext.of(sources),
        )

    def of_row(self, row: int) -> Positions:
        """Return the positions of one row."""
        end = self.starts[row] + self.width
        return Positions(
            slots=[self.slots[row]],
            starts=[self.starts[row]],
            width=self.width,
            end=min(end, self.end),
            indices=self.indices[row : row + 1],
            aligned=True,
            prompts=self.prompts[row : row + 1],
            encoder=None if self.encoder is None else self.encoder.of_row(row),
            tables=self.tables,
            plain=self.plain,
        )

    def rows(self, device: torch.device) -> Tensor:
        """Return the slots as a tensor, made once for a pass: (batch, 1)."""
        if self._rows is None or self._rows.device != device:
            self._rows = torch.tensor(self.slots, device=device)[:, None]
        return self._rows

    @property
    def position_ids(self) -> Tensor | None:
        """Where the positions are, (axes, batch, width), see `DecoderInputs.position_ids`.

        None where no row's prompt says, so that each is its number.
        """
        if self.plain:
            return None
        if self._position_ids is None:
            self._position_ids = (own_position_ids(self.prompts, self.indices),)
        return self._position_ids[0]

    @property
    def prompt_lengths(self) -> list[int]:
        """Positions of each row's prompt, on which some rotations depend."""
        return [0 if prompt is None else len(prompt) for prompt in self.prompts]

    @property
    def blocks(self) -> Tensor | None:
        """The bidirectional block of each key, (batch, end), see `DecoderInputs.blocks`.

        None where no position of this pass is in one.
        """
        if self.plain:
            return None
        if self._blocks is None:
            self._blocks = (self._own_blocks(),)
        return self._blocks[0]

    @property
    def injects(self) -> bool:
        """Whether anything is added to the hidden states of this pass, see `injection`."""
        return not self.plain and any(prompt and prompt.injections for prompt in self.prompts)

    def injection(self, layer: int, like: Tensor) -> Tensor | None:
        """Return what is added after a layer, (batch, width, d_model); None for nothing.

        Args:
            layer: The layer; -1 for before the first.
            like: The hidden states that it is added to.
        """
        found: Tensor | None = None
        for row, (prompt, start) in enumerate(zip(self.prompts, self.starts, strict=False)):
            if prompt is None or layer not in prompt.injections or start >= len(prompt):
                continue
            if found is None:
                found = torch.zeros_like(like)
            states = prompt.injections[layer][start : start + self.width]
            found[row, : len(states)] = states.to(like)
        return found

    def mask(self, kind: MaskKind = FULL) -> Tensor | None:
        """Return which keys each position sees, as `visible`, or None for causal.

        None means that the usual causal rule is right: a pass from position 0, or one position at
        the end of equally long rows.

        Args:
            kind: What the layer sees.
        """
        if kind not in self._masks:
            whole = kind == FULL or kind.is_whole(self.end)
            last = self.end == self.starts[0] + self.width
            causal = self.aligned and whole and last and (self.width == 1 or self.starts[0] == 0)
            causal = causal and self.blocks is None
            self._masks[kind] = None if causal else self.visible(FULL if whole else kind)
        return self._masks[kind]

    @property
    def distances(self) -> Tensor:
        """How far keys lie before each position: (batch or, if aligned, 1, width, end)."""
        here = self.indices[:1] if self.aligned else self.indices
        return here[..., None] - torch.arange(self.end, device=here.device)

    def visible(self, kind: MaskKind = FULL) -> Tensor:
        """Return which keys each position sees: (batch, 1, width, end).

        Args:
            kind: What the layer sees.
        """
        keys = torch.arange(self.end, device=self.indices.device)
        here = self.indices[:, None, :, None]
        seen = kind.visible(here, keys)
        if kind.kept is not None:
            lengths = torch.tensor(self.prompt_lengths, device=here.device)[:, None, None, None]
            seen = seen & ((here < lengths) | (keys > here - kind.kept))
        if (blocks := self.blocks) is not None:
            own = blocks.gather(1, self.indices.clamp(max=self.end - 1))
            beside = in_the_same_block(own, blocks)[:, None]
            limited = [bool(one and one.windows_limit_blocks) for one in self.prompts]
            rows = torch.tensor(limited, device=here.device)[:, None, None, None]
            seen = seen | torch.where(rows, kind.limited(beside, here, keys), beside)
        return seen

    def _own_blocks(self) -> Tensor | None:
        found: Tensor | None = None
        for row, (prompt, start) in enumerate(zip(self.prompts, self.starts, strict=False)):
            if prompt is None or prompt.blocks is None or start >= len(prompt):
                continue
            own = prompt.blocks[: self.end].to(self.indices.device)
            if bool((own[start : start + self.width] == OUTSIDE).all()):
                continue
            if found is None:
                found = torch.full_like(self.indices[:, :1], OUTSIDE).repeat(1, self.end)
            found[row, : len(own)] = own
        return found


def own_position_ids(prompts: Sequence[DecoderInputs | None], indices: Tensor) -> Tensor | None:
    """Return where positions are, (axes, batch, width); None where each is its number.

    Args:
        prompts: Of each row. A reply's positions count on from the greatest of its prompt's.
        indices: The positions: (batch, width).
    """
    given = {
        row: prompt.position_ids
        for row, prompt in enumerate(prompts)
        if prompt is not None and prompt.position_ids is not None
    }
    if not given:
        return None
    found = indices.expand(max(map(len, given.values())), *indices.shape).clone()
    for row, ids in given.items():
        length, here = ids.shape[1], indices[row]
        after = here - length + ids.max() + 1
        inside = ids[:, here.clamp(max=length - 1)]
        found[:, row] = torch.where(here < length, inside, after)
    return found
