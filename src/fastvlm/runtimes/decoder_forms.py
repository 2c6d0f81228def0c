"""A decoder's parts as graphs take them: its layers, those of its drafts, and its LM head."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from fastvlm.functional.errors import InputError
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.layer_calls import LayerCall
from fastvlm.runtimes.graph_parts import Head
from fastvlm.runtimes.layer_form import GraphLayer, Product, layer_form, linear_form, norm_form
from fastvlm.runtimes.rotations import GraphRotations


class DecoderForms:
    """Reads a decoder's parts.

    Args:
        split: The decoder in torch.
        refusal: Makes the error that says why a part can't be read, of a reason.

    Raises:
        InputError: It rotates by other tables than are known.
    """

    def __init__(
        self, split: GeneralDecoder, refusal: Callable[[str], InputError] = InputError
    ) -> None:
        self.split, self.refusal = split, refusal
        try:
            self.rotations = GraphRotations(split)
        except InputError as error:
            raise refusal(str(error)) from error

    def layer(self, number: int) -> GraphLayer:
        """Return one of the target's layers.

        Raises:
            InputError: It is of another form than is known.
        """
        call = self.split.calls.layers[number]
        return self._graph_layer(self.split.layers[number], call, f"layer {number}")

    def kind(self, number: int) -> Hashable:
        """Return what tells one of the target's layers from those that are computed otherwise."""
        layer = self.layer(number)
        return layer.form.kind, layer.rotation, layer.mask

    def kinds(self) -> list[int]:
        """Return the first layer of each kind."""
        found = {self.kind(number): number for number in reversed(range(self.split.depth))}
        return sorted(found.values())

    def block_reader(self, blocks: Sequence[nn.Module]) -> Callable[[int], GraphLayer]:
        """Return what reads layers that are not the target's own, by their numbers."""
        calls = self.split.calls.layers[-len(blocks) :]
        return lambda number: self._graph_layer(blocks[number], calls[number], "a draft's layer")

    def head(self, rows: Tensor | None = None, *, normed: bool = False) -> Head:
        """Return what makes logits of hidden states, or of normed ones.

        Args:
            rows: The LM head's rows that are wanted; None for all.
            normed: Whether states are normed already.

        Raises:
            InputError: It is of another form than is known.
        """
        split = self.split
        try:
            weights = linear_form(split.lm_head) if rows is None else Product(rows.float(), None)
            norm = None
            if not normed:
                norm = norm_form(getattr(split.decoder, split.part_names["norm"]))
        except InputError as error:
            raise self.refusal(f"of its head, {error}") from error
        return Head(norm, weights)

    def _graph_layer(self, layer: Any, call: LayerCall, what: str) -> GraphLayer:
        if call.rotary is None:
            raise self.refusal(f"{what} rotates nothing")
        try:
            return GraphLayer(layer_form(layer), self.rotations.kinds[call.rotary], call.mask)
        except InputError as error:
            raise self.refusal(f"{what} is of another form than is known: {error}") from error
