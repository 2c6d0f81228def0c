"""The rotations of queries and keys by their positions, as a model's own module makes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastvlm.functional.errors import InputError
from fastvlm.language.positions import Positions

TABLE_POSITIONS = 256
"""Positions that a table of rotations has beyond those that are asked for."""

Rotations = Tensor | tuple[Tensor, ...]
"""Cosines and sines, or complex numbers: (batch, width, size) each."""


class Rotary:
    """The rotations of positions, as a model's own module gives them to `generate`.

    The module itself is never changed: with some kinds of scaling it keeps the frequencies of what
    it saw last, which is no other request's business.

    Args:
        module: The model's `rotary_emb`.
        layer_type: The kind of layer that the module is told, where it tells them apart.
        axes: Whether the module takes time, height and width: (3, batch, width).
    """

    def __init__(self, module: Any, layer_type: str | None = None, *, axes: bool = False) -> None:
        self.module, self.layer_type, self.axes = module, layer_type, axes
        parameters: Any = module.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        self.scaling: str = parameters["rope_type"]
        self.is_static = self.scaling != "longrope" and "dynamic" not in self.scaling
        """Whether a position's rotation depends on the position alone."""
        self.table = f"rotations of {layer_type}"
        """What its table is called, see `Positions.tables`."""
        own: int = module.config.max_position_embeddings
        longrope = self.scaling == "longrope"
        self.original: int = parameters["original_max_position_embeddings"] if longrope else own

        if not self.is_static and not hasattr(type(module).forward, "__wrapped__"):
            raise InputError(
                f"{type(module).__name__} scales rotations by a rule of its own, which fastvlm"
                " doesn't know; decode the model with transformers' own generate."
            )

    def __call__(self, x: Tensor, positions: Positions) -> Rotations:
        """Return the rotations of a pass, in the precision of `x`."""
        if not self.is_static:
            return self._scaled(x, positions)
        ids = positions.position_ids
        return self._from_table(x, positions) if ids is None else self._compute(self.module, x, ids)

    def regime(self, position: int, prompt_length: int) -> int:
        """Return the length that a position's frequencies are for; 0 for the original ones.

        `generate` computes a prompt with the frequencies of the whole prompt's length, and then
        each position with those of the length so far.
        """
        length = max(position + 1, prompt_length)
        if self.is_static or length <= self.original:
            return 0
        # LongRoPE has two sets of frequencies, dynamic scaling has one for each length.
        return self.original + 1 if self.scaling == "longrope" else length

    def _compute(self, module: Any, x: Tensor, ids: Tensor) -> Rotations:
        if ids.dim() == 2:  # noqa: PLR2004 (batch, width)
            ids = ids[None]
        ids = ids.expand(3, -1, -1) if self.axes else ids[0]
        found: Rotations = (
            module(x, ids) if self.layer_type is None else module(x, ids, self.layer_type)
        )
        return found

    def _from_table(self, x: Tensor, positions: Positions) -> Rotations:
        tables = positions.tables
        if tables is None:
            return self._compute(self.module, x, positions.indices)
        known: tuple[torch.dtype, int, Rotations] | None = tables.get(self.table)
        if known is None or known[0] != x.dtype or known[1] < positions.end:
            length = positions.end + TABLE_POSITIONS
            counted = torch.arange(length, device=positions.indices.device)
            made = self._compute(self.module, x, counted[None])
            known = tables[self.table] = x.dtype, length, _at(0, made)
        if positions.aligned:
            first = positions.starts[0]
            return _at((None, slice(first, first + positions.width)), known[2])
        return _at(positions.indices, known[2])

    def _scaled(self, x: Tensor, positions: Positions) -> Rotations:
        """Return the rotations of a pass whose positions may have frequencies of their own."""
        ids = positions.indices if positions.position_ids is None else positions.position_ids
        regimes = torch.tensor(
            [
                [self.regime(start + offset, length) for offset in range(positions.width)]
                for start, length in zip(positions.starts, positions.prompt_lengths, strict=True)
            ],
            device=x.device,
        )
        found: Rotations | None = None
        for regime in regimes.unique().tolist():
            # PhiMoE's module also scales what it returns by the greatest position that it is given.
            last = ids.new_full((*ids.shape[:-1], 1), max(regime - 1, 0))
            own = torch.cat((ids.where(regimes == regime, 0), last), -1)
            one = self._compute(self._with_frequencies(x, regime), x, own)
            one = _at((slice(None), slice(-1)), one)
            found = one if found is None else _where((regimes == regime)[..., None], one, found)
        assert found is not None  # a pass has a position
        return found

    def _with_frequencies(self, x: Tensor, regime: int) -> Any:
        """Return a copy of the module whose frequencies are fixed: those for a length."""
        fixed: Any = copy.copy(self.module)
        fixed._buffers = {name: buffer.clone() for name, buffer in self.module._buffers.items()}
        kind = self.layer_type
        prefix = "" if kind is None else f"{kind}_"
        frequencies = getattr(self.module, f"{prefix}original_inv_freq").to(x.device)
        if regime:
            named = {} if kind is None else {"layer_type": kind}
            initialise = ROPE_INIT_FUNCTIONS[self.scaling]
            frequencies, scaling = initialise(self.module.config, x.device, seq_len=regime, **named)
            if self.scaling != "longrope":
                setattr(fixed, f"{prefix}attention_scaling", scaling)
        fixed._buffers[f"{prefix}inv_freq"] = frequencies
        # The module's own rule would choose frequencies by the greatest position of the pass.
        fixed.rope_type = "default" if kind is None else {**fixed.rope_type, kind: "default"}
        return fixed


def is_longrope(config: Any) -> bool:
    """Return whether a decoder rotates by LongRoPE, with other frequencies for long rows."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "longrope"


def _at(index: Any, rotations: Rotations) -> Rotations:
    """Return a part of rotations: what each of their tensors has at an index."""
    if isinstance(rotations, Tensor):
        return rotations[index]
    return tuple(map(itemgetter(index), rotations))


def _first(rotations: Rotations) -> Tensor:
    return rotations if isinstance(rotations, Tensor) else rotations[0]


def _where(chosen: Tensor, one: Rotations, other: Rotations) -> Rotations:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.where(chosen, _first(one), _first(other))
    return tuple(torch.where(chosen, *pair) for pair in zip(one, other, strict=True))


def scaled_context(config: Any) -> int:
    """Return the positions that a model was made for, its scaling of rotations included.

    Some configurations name the length before scaling, as `max_position_embeddings` and nowhere
    else.
    """
    length: int = config.max_position_embeddings
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    kinds: Sequence[Any] = [parameters]
    if "rope_type" not in parameters:
        kinds = [kind for kind in parameters.values() if isinstance(kind, dict)]
    return max((_scaled_length(length, kind) for kind in kinds), default=length)


def _scaled_length(length: int, parameters: Any) -> int:
    scales = parameters.get("rope_type") in {"yarn", "dynamic", "linear", "llama3", "longrope"}
    if not scales or parameters.get("original_max_position_embeddings", length) != length:
        return length
    return int(length * (parameters.get("factor") or 1))
