"""Decoder layers on a GPU: the models' own products, and kernels of ours between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from fastvlm.functional.errors import InputError
from fastvlm.language.cache import DecoderCache
from fastvlm.language.fused import kind_of
from fastvlm.language.layer_calls import LayerCall, RotaryKind
from fastvlm.runtimes.triton_kernels import (
    CacheRows,
    attention,
    gated,
    rms_norm,
    rotate_and_store,
)

ACTIVATION_NAMES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.SiLU, "silu"),
    (SiLUActivation, "silu"),
    (GELUTanh, "gelu_tanh"),
)


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """A layer that is computed here.

    Args:
        module: The layer, as `transformers` made it.
        unit_offset: Whether its norms multiply by 1 + weight.
        sandwiched: Whether there are norms after its parts too.
        activation: Of its feed-forward part, see `gated`.
        rotary: The rotations that it is given.
        window: The last positions that each position of a reply sees; None for all.
    """

    module: Any
    unit_offset: bool
    sandwiched: bool
    activation: str
    rotary: RotaryKind
    window: int | None


@dataclass(frozen=True, slots=True)
class GpuPass:
    """What layers are given beside hidden states.

    Args:
        cache: Where they keep their keys and values.
        rows: Where the pass's rows lie in it.
        rotations: Cosines and sines of each kind: (batch, width, size) each, contiguous.
    """

    cache: DecoderCache
    rows: CacheRows
    rotations: Mapping[RotaryKind, tuple[Tensor, Tensor]]


def gpu_layer(module: nn.Module, call: LayerCall) -> GpuLayer:
    """Return a layer as it is computed here.

    Raises:
        InputError: It is of another form than is known.
    """
    kind = kind_of(module)
    parts: Any = module._modules
    if kind is None:
        raise InputError("its class is none that is known, or it has hooks")
    name = next((name for cls, name in ACTIVATION_NAMES if type(parts["mlp"].act_fn) is cls), None)
    if name is None:
        raise InputError(f"its activation is {type(parts['mlp'].act_fn).__name__}")
    if call.rotary is None or call.mask.chunk is not None:
        raise InputError("it rotates nothing, or attends in chunks")
    windows = [size for size in (call.mask.window, call.mask.kept) if size is not None]
    window = min(windows, default=None)
    return GpuLayer(module, kind.unit_offset, kind.sandwiched, name, call.rotary, window)


def run_layers(layers: Sequence[GpuLayer], x: Tensor, given: GpuPass) -> Tensor:
    """Return the hidden states after some layers: (batch, width, d_model) to the same."""
    # What a part adds to the states is added by the norm that reads them next.
    added: Tensor | None = None
    for layer in layers:
        parts = layer.module._modules
        x, normed = _norm(layer, "input_layernorm", x, added)
        found = _attend(layer, normed, given)
        if layer.sandwiched:
            found = _norm(layer, "post_attention_layernorm", found)[1]
            x, normed = _norm(layer, "pre_feedforward_layernorm", x, found)
        else:
            x, normed = _norm(layer, "post_attention_layernorm", x, found)
        mlp = parts["mlp"]._modules
        between = gated(mlp["gate_proj"](normed), mlp["up_proj"](normed), layer.activation)
        added = mlp["down_proj"](between)
        if layer.sandwiched:
            added = _norm(layer, "post_feedforward_layernorm", added)[1]
    return x if added is None else x + added


def final_norm(norm: nn.Module, layer: GpuLayer, x: Tensor) -> Tensor:
    """Return normed states, by a norm of the kind that a layer's are: in the shape of `x`."""
    return rms_norm(x, _weight(norm), _eps(norm), unit_offset=layer.unit_offset)[1]


def _attend(layer: GpuLayer, x: Tensor, given: GpuPass) -> Tensor:
    module: Any = layer.module._modules["self_attn"]
    parts = module._modules
    batch, width, _ = x.shape
    shape = batch, width, -1, module.head_dim
    queries, keys, values = (parts[name](x).view(shape) for name in ("q_proj", "k_proj", "v_proj"))
    if "q_norm" in parts:
        queries = final_norm(parts["q_norm"], layer, queries)
        keys = final_norm(parts["k_norm"], layer, keys)
    # (any number, kv_heads, any number, size), by which the cache knows what to hold.
    storage = given.cache.storage(module.layer_idx, keys.transpose(1, 2), values.transpose(1, 2))
    held = storage.keys, storage.values
    rotate_and_store(queries, keys, values, given.rotations[layer.rotary], held, given.rows)
    found = attention(queries, held, given.rows, module.scaling, layer.window)
    output: Tensor = parts["o_proj"](found.view(batch, width, -1))
    return output


def _norm(
    layer: GpuLayer, name: str, x: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    norm = layer.module._modules[name]
    return rms_norm(x, _weight(norm), _eps(norm), added, unit_offset=layer.unit_offset)


def _weight(norm: Any) -> Tensor:
    weight: Tensor = norm._parameters["weight"]
    return weight


def _eps(norm: Any) -> float:
    eps: float = getattr(norm, "variance_epsilon", None) or norm.eps
    return eps
