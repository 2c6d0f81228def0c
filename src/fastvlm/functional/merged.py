"""Linear layers of the same input as one product, with a matrix of all their weights.

A step of a small model takes about as long to call the products of queries, keys and values, and of
a feed-forward network's gate and what it lets through, as to read their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.functional.packed import PackedWeight, hold, may_pack, packed_weight
from fastvlm.functional.products import Product, product_of, product_of_several


class MergedProduct:
    """The products of several layers as one.

    Args:
        layers: The layers, with their weights as they are.
        product: What multiplies by the weights of all, one beneath another.
        twice: Whether a layer's own weights may be held in two layouts.
    """

    def __init__(self, layers: Sequence[nn.Linear], product: Product, *, twice: bool) -> None:
        self.product = product
        self.twice = twice
        self.sizes = tuple(layer.out_features for layer in layers)
        self.read_bytes = product.read_bytes / sum(self.sizes)
        self.held: list[PackedWeight[Product]] = [
            packed_weight(layer.weight, OwnProduct(self, layer.out_features)) for layer in layers
        ]

    def __call__(self, layers: Sequence[Any], x: Tensor) -> Sequence[Tensor] | None:
        """Return the products of the layers; None if one of them is no longer what it was.

        Args:
            layers: The layers.
            x: (..., in_features).
        """
        for layer, held in zip(layers, self.held, strict=True):
            own = vars(layer)
            if (
                own.get("packed") is not held
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or not held.is_of(own["_parameters"].get("weight"))
            ):
                return None
        biases = [layer._parameters["bias"] for layer in layers]
        # Added before the sums are rounded; put together at each call, as they may change.
        bias = None if biases[0] is None else torch.cat(biases)
        return self.product(x, self.held[0].weight, bias).split(self.sizes, -1)


class OwnProduct:
    """What a merged layer multiplies by where it is called by itself: packed at the first call.

    Args:
        merged: The product of several that the layer's is a part of.
        rows: The layer's part of its rows.
    """

    def __init__(self, merged: MergedProduct, rows: int) -> None:
        self.merged = merged
        self.read_bytes = round(merged.read_bytes * rows)
        self.product: Product | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the packed matrix takes."""
        return 0 if self.product is None else self.product.nbytes

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product. See `Product`."""
        product = self.product
        if product is None:
            # Threads that come here together pack it alike.
            product = self.product = product_of(weight.detach(), twice=self.merged.twice)
        return F.linear(x, weight, bias) if product is None else product(x, weight, bias)


def merge(layers: Sequence[nn.Module], most_bytes: int, *, twice: bool) -> int:
    """Pack the weights of layers that are given the same input as one matrix, where that pays.

    Each of them remains a layer by itself, and is packed by itself if it is called as such.

    Args:
        layers: The layers.
        most_bytes: The most memory for packed weights, of each by itself too.
        twice: Whether a weight may be held in two layouts.

    Returns:
        The bytes that the matrix takes; 0 if there is none.
    """
    found = [layer for layer in layers if isinstance(layer, nn.Linear) and may_pack(layer)]
    weights = [layer.weight.detach() for layer in found]
    alike = {(layer.weight.dtype, layer.in_features, layer.bias is None) for layer in found}
    size = 2 * (1 + twice) * sum(weight.nbytes for weight in weights)
    if len(found) < len(layers) or len(alike) > 1 or size > most_bytes:
        return 0
    product = product_of_several(torch.cat(weights), twice=twice)
    if product is None:
        return 0
    merged = MergedProduct(found, product, twice=twice)
    for layer, held in zip(found, merged.held, strict=True):
        hold(layer, held)
    return product.nbytes


def products(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """Return what layers make of the same input, by one product if they are merged.

    Args:
        layers: Linear layers, or modules that are called as such.
        x: (..., in_features).
    """
    packed = vars(layers[0]).get("packed")
    if packed is not None and type(packed.product) is OwnProduct:
        found: Sequence[Tensor] | None = packed.product.merged(layers, x)
        if found is not None:
            return found
    return [layer(x) for layer in layers]
