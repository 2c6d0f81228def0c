"""Weights of whole numbers behind a tensor subclass, as torchao's are."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Int8Weight(Tensor):
    """Stands for the product of `codes` (out, in) and `scale` (out, 1); computes, and no more."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Self:
        made: Any = Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
        return cls((weight / scale).round().char(), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Int8Weight:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func not in {torch.ops.aten.t.default, torch.ops.aten.mm.default}:
            raise NotImplementedError(func)

        def plain(value: Any) -> Any:
            return value.codes * value.scale if isinstance(value, Int8Weight) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


@torch.no_grad()
def quantise_linears(model: nn.Module) -> None:
    """Replace the weights of all linear layers that aren't tied to an embedding."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = Int8Weight.of(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
