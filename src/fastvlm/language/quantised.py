"""Linear layers with weights of 8 or 4 bits on a CPU, for products of few rows.

Weights alone are quantised: each row of a matrix to 8 bits, or each 32 weights of a row to 4.
FBGEMM multiplies whole numbers of 8 bits, so each activation is split into two of them, together 15
bits below the largest of its row. Sums of whole numbers are exact, so a row is the same beside any
others. Products with 4 bits are torch's, of activations in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastvlm.functional.errors import InputError
from fastvlm.functional.packed import PackedLinear
from fastvlm.language.structure import text_decoder

Bits = Literal["int8", "int4"]
GROUP = 32
"""Weights that share a scale and an offset where there are 4 bits."""
SMALLEST_WEIGHTS = 2**14
"""Weights of a matrix that is quantised: fewer are hardly read faster."""
LEAST = 1e-30
"""What a scale is at least, as a row may be zeros."""
INT4_ROWS = 16
"""Matrices of 4 bits have a multiple of so many rows."""


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers of 8 bits, with a scale for each output.

    Args:
        codes: The whole numbers: (out, in).
        scales: Of each output: (out,), in float32.
        bias: What is added: (out,).
    """

    weight: None = None
    """Some layers ask for the precision of what they hold, where it is a tensor."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        offsets = torch.zeros(len(codes), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), offsets, 0)
        self._packed: Any = torch.ops.quantized.linear_prepack(weight, None)
        self._multiply: Callable[..., Tensor] = (
            torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        )

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """Return a layer with the weights of another, quantised."""
        weight = layer.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(LEAST) / 127
        return cls((weight / scales[:, None]).round().to(torch.int8), scales, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product: (..., in_features) to (..., out_features), in the precision of x."""
        most = most_activation()
        rows = x.reshape(-1, self.in_features).float()
        sizes = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True)
        scaled = rows * (most / sizes.clamp_min(LEAST))
        coarse = scaled.round()
        fine = (scaled - coarse).mul_(2 * most)
        both = torch.cat((coarse, fine))
        # With this scale and this offset FBGEMM's whole numbers are the rounded values.
        high, low = self._multiply(both, 1.0, most + 1, self._packed).chunk(2)
        found = high.add_(low, alpha=1 / (2 * most)).mul_(sizes * (1 / most))
        if self.bias is not None:
            found.add_(self.bias)
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows of the matrix that the weights stand for, in float32: (rows, in)."""
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        scales = weight.q_per_channel_scales().float()
        return weight.int_repr()[indices].float() * scales[indices, None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the whole numbers, as what is packed for a CPU is not copied."""
        del protocol
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        return Int8Linear, (weight.int_repr(), weight.q_per_channel_scales().float(), self.bias)


class Int4Linear(nn.Module):
    """A linear layer whose weights are whole numbers of 4 bits, in groups.

    Args:
        packed: The whole numbers, as `torch` packs them for a CPU.
        scales: A scale and an offset of each group: (in / 32, out, 2), in bfloat16.
        bias: What is added: (out,).
    """

    packed: Tensor
    scales: Tensor
    weight: None = None

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = scales.shape[1], GROUP * scales.shape[0]
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int4Linear:
        """Return a layer with the weights of another, quantised."""
        weight = layer.weight.detach().float()
        groups = weight.view(layer.out_features, -1, GROUP)
        low, high = groups.aminmax(dim=-1)
        # As they are kept, so that each weight goes to the nearest of what can be had.
        scales = ((high - low) / 15).clamp_min(LEAST).bfloat16()
        middles = (low.float() + 8 * scales.float()).bfloat16()
        codes = (groups - middles.float()[..., None]) / scales.float()[..., None]
        codes = (codes.round() + 8).clamp_(0, 15).to(torch.int32).view_as(weight)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        both = torch.stack((scales, middles), -1).transpose(0, 1).contiguous()
        return cls(packed, both, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product: (..., in_features) to (..., out_features), in the precision of x."""
        found = self._product(x.reshape(-1, self.in_features)).to(x.dtype)
        if self.bias is not None:
            found.add_(self.bias)
        return found.view(*x.shape[:-1], self.out_features)

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows of the matrix that the weights stand for, in float32: (rows, in)."""
        parts = torch.eye(self.in_features).split(2**10)
        return torch.cat([self._product(part)[:, indices].T for part in parts], 1).float()

    def _product(self, rows: Tensor) -> Tensor:
        # Whatever precision a model was cast to.
        scales = self.scales.bfloat16()
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.bfloat16(), self.packed, GROUP, scales
        )
        return found


LAYERS: dict[str, Any] = {"int8": Int8Linear, "int4": Int4Linear}


@cache
def most_activation() -> int:
    """Return the largest whole number that activations are made of.

    Without VNNI pairs of products are summed in 16 bits, which 7 bits of activations don't exceed.
    """
    # Releases of torch have one name for it or the other.
    names = ("_is_avx512_vnni_supported", "_is_vnni_supported")
    asked: list[Any] = [getattr(torch.cpu, name, None) for name in names]
    return 127 if any(one is not None and one() for one in asked) else 63


def checked_bits(bits: Any) -> Bits | None:
    """Return what weights are quantised to.

    Raises:
        InputError: It is nothing that there is.
    """
    if bits is not None and bits not in LAYERS:
        raise InputError(f"quantize is {' or '.join(LAYERS)}; got {bits!r}.")
    found: Bits | None = bits
    return found


@torch.no_grad()
def quantise(parts: Iterable[nn.Module], bits: Bits) -> int:
    """Replace the large linear layers of some modules by quantised ones; return their number.

    Args:
        parts: Whose linear layers are replaced, not themselves.
        bits: The precision of weights.

    Raises:
        InputError: This machine or this torch multiplies by no such weights, or the modules are
            not on a CPU.
    """
    if bits == "int8" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise InputError("Weights in int8 are for x86 CPUs, with a torch that has FBGEMM.")
    made: dict[int, nn.Module] = {}
    for part in parts:
        for module in list(part.modules()):
            for name, layer in list(module.named_children()):
                if id(layer) not in made and _is_quantised(layer, bits):
                    made[id(layer)] = LAYERS[bits].of(layer)
                if id(layer) in made:
                    setattr(module, name, made[id(layer)])
    if not made:
        raise InputError(f"There is no layer here whose weights can be held in {bits} on a CPU.")
    return len(made)


def quantise_decoder(model: Any, bits: Bits | None) -> int:
    """Hold the weights of a model's decoder and LM head in few bits; return the number of layers.

    Embeddings stay, those that the LM head shares too. `transformers`' own `generate` decodes the
    quantised model like fastvlm. A draft is loaded before that, as it is made for the model.

    Args:
        model: A causal, an encoder-decoder or a vision-language model of a family that is known.
        bits: The precision of weights; None to leave them as they are.

    Raises:
        InputError: See `quantise`.
    """
    if bits is None:
        return 0
    number = quantise([text_decoder(model)], bits)
    head = model.get_output_embeddings()
    if head is not None and _is_quantised(head, bits):
        with torch.no_grad():
            model.set_output_embeddings(LAYERS[bits].of(head))
        number += 1
    return number


def _is_quantised(layer: nn.Module, bits: Bits) -> bool:
    if type(layer) not in {nn.Linear, PackedLinear} or hasattr(layer, "_hf_hook"):
        return False
    weight: Any = layer.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    large = plain and weight.is_floating_point() and weight.numel() >= SMALLEST_WEIGHTS
    whole = weight.shape[1] % GROUP == 0 and weight.shape[0] % INT4_ROWS == 0
    return large and (bits == "int8" or whole)
