"""Decoder layers in fewer operators: what their own code computes, in half of the calls.

On a CPU a step of a small model is mostly the calling of operators and modules. Many families share
the code of Llama's parts, or of Qwen's and Gemma's: layers whose classes have that very code are
computed here. Their linear layers and activations are called as the modules that they are, packed,
quantised or adapted; any other layer, one with hooks, and all of them while gradients are recorded,
are called as ever. `verification` holds the result against the model itself.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastvlm.language.bare import is_bare
from fastvlm.language.cache import KeyValueCache
from fastvlm.language.layer_calls import CACHE_NAMES

PRE_NORM = ("llama.LlamaDecoderLayer", "qwen2.Qwen2DecoderLayer")
SANDWICHED = ("gemma3.Gemma3DecoderLayer",)
ATTENTIONS = (
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
    "gemma3.Gemma3Attention",
)
FEED_FORWARDS = ("llama.LlamaMLP",)
NORMS = ("llama.LlamaRMSNorm",)
UNIT_OFFSET_NORMS = ("gemma3.Gemma3RMSNorm",)
"""Classes of `transformers` whose code is known. Norms of the last kind multiply by 1 + weight."""

Norm = Callable[[Any, Tensor], Tensor]


class LayerKind(NamedTuple):
    """How a layer is computed.

    Args:
        norm: What its norms do to the last dimension of a tensor.
        sandwiched: Whether there are norms after its parts too.
        unit_offset: Whether norms multiply by 1 + weight.
    """

    norm: Norm
    sandwiched: bool
    unit_offset: bool


@dataclass(slots=True)
class LayerInputs:
    """What layers that are called alike are given beside the hidden states.

    Args:
        cos: Cosines of the rotations: (batch or 1, 1, width, head_dim).
        sin: Their sines, the first half of them negated.
        mask: What is added to attention scores, (batch, 1, width, end); None for causal.
        cache: Where layers keep their keys and values.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    cache: KeyValueCache
    _grouped: dict[int, Tensor] = field(default_factory=dict)

    def grouped_mask(self, groups: int) -> Tensor | None:
        """Return the mask for queries that share a head of keys, one after another."""
        if self.mask is None or self.mask.shape[2] == 1:
            return self.mask
        if groups not in self._grouped:
            self._grouped[groups] = self.mask.repeat(1, 1, groups, 1)
        return self._grouped[groups]


def layer_inputs(decoder: Any, x: Tensor, given: Mapping[str, Any]) -> LayerInputs | None:
    """Return what layers of a known kind are given in a pass; None where none is computed here.

    Args:
        decoder: The decoder that the layers belong to.
        x: The hidden states.
        given: What the layers' own code is given.
    """
    rotations = given.get("position_embeddings")
    held: Any = next((given[name] for name in CACHE_NAMES if name in given), None)
    if (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not isinstance(rotations, tuple)
        or held is None
        or "encoder_hidden_states" in given
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or decoder.config._attn_implementation != "sdpa"
        or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    ):
        return None
    cos, sin = rotations
    half = sin.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    mask: Tensor | None = given.get("attention_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, float("-inf"))
    return LayerInputs(cos.unsqueeze(1), signed.unsqueeze(1), mask, held)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """Return how a layer is computed here; None where it is not, now."""
    parts = layer._modules
    attention, feed_forward = parts.get("self_attn"), parts.get("mlp")
    norm = parts.get("input_layernorm")
    if attention is None or feed_forward is None or norm is None:
        return None
    kind = known_kind(
        type(layer).forward,
        type(attention).forward,
        type(feed_forward).forward,
        type(norm).forward,
    )
    if kind is None or layer.training:
        return None
    norms = [part for name, part in parts.items() if name.endswith("layernorm")]
    norms += [part for name, part in attention._modules.items() if name.endswith("_norm")]
    for one in norms:
        if type(one) is not type(norm) or not is_bare(one):
            return None
    bare = is_bare(layer) and is_bare(attention) and is_bare(feed_forward)
    return kind if bare else None


def run_layer(layer: nn.Module, kind: LayerKind, x: Tensor, inputs: LayerInputs) -> Tensor:
    """Return a layer's hidden states: (batch, width, d_model) to the same."""
    parts: Any = layer._modules
    norm = kind.norm
    found = _attend(parts["self_attn"], norm, norm(parts["input_layernorm"], x), inputs)
    if not kind.sandwiched:
        x = x + found
        return x + _feed_forward(parts["mlp"], norm(parts["post_attention_layernorm"], x))
    x = x + norm(parts["post_attention_layernorm"], found)
    found = _feed_forward(parts["mlp"], norm(parts["pre_feedforward_layernorm"], x))
    return x + norm(parts["post_feedforward_layernorm"], found)


def _attend(attention: Any, norm: Norm, x: Tensor, inputs: LayerInputs) -> Tensor:
    parts = attention._modules
    batch, width, _ = x.shape
    shape = batch, width, -1, attention.head_dim
    queries, keys = parts["q_proj"](x).view(shape), parts["k_proj"](x).view(shape)
    values = parts["v_proj"](x).view(shape).transpose(1, 2)
    if "q_norm" in parts:
        queries, keys = norm(parts["q_norm"], queries), norm(parts["k_norm"], keys)
    queries = _rotate(queries.transpose(1, 2), inputs)
    keys = _rotate(keys.transpose(1, 2), inputs)
    keys, values = inputs.cache.update(keys, values, attention.layer_idx)
    heads, groups = queries.shape[1], queries.shape[1] // keys.shape[1]
    if groups > 1 and (width == 1 or inputs.mask is not None):
        # Side by side the queries of a head of keys need no copies of it.
        queries = queries.reshape(batch, keys.shape[1], groups * width, -1)
        found = F.scaled_dot_product_attention(
            queries, keys, values, inputs.grouped_mask(groups), scale=attention.scaling
        ).view(batch, heads, width, -1)
    else:
        found = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            inputs.mask,
            is_causal=width > 1 and inputs.mask is None and attention.is_causal,
            scale=attention.scaling,
            enable_gqa=groups > 1,
        )
    output: Tensor = parts["o_proj"](found.transpose(1, 2).reshape(batch, width, -1))
    return output


def _rotate(x: Tensor, inputs: LayerInputs) -> Tensor:
    """Return rotated heads, rounded as by the models' own code: (batch, heads, width, head_dim)."""
    return (x * inputs.cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(inputs.sin))


def _feed_forward(part: Any, x: Tensor) -> Tensor:
    parts = part._modules
    found: Tensor = parts["down_proj"](parts["act_fn"](parts["gate_proj"](x)) * parts["up_proj"](x))
    return found


def _norm(norm: Any, x: Tensor) -> Tensor:
    found = _scaled(x, norm.variance_epsilon)
    return norm.weight * (found if x.dtype == torch.float32 else found.to(x.dtype))


def _unit_offset_norm(norm: Any, x: Tensor) -> Tensor:
    found = _scaled(x, norm.eps).mul_(1.0 + norm.weight.float())
    return found if x.dtype == torch.float32 else found.to(x.dtype)


def _scaled(x: Tensor, eps: float) -> Tensor:
    """Return vectors in float32, divided by the root of their mean square.

    The operators are the models' own: in 16 bits another last bit would be other tokens.
    """
    x = x if x.dtype == torch.float32 else x.float()
    return x * x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()


@cache
def known_kind(
    layer: Callable[..., Any],
    attention: Callable[..., Any],
    feed_forward: Callable[..., Any],
    norm: Callable[..., Any],
) -> LayerKind | None:
    """Return how layers of some classes are computed, by the code of their parts' `forward`."""
    if not is_one_of(attention, ATTENTIONS) or not is_one_of(feed_forward, FEED_FORWARDS):
        return None
    rotate = _global(attention, "apply_rotary_pos_emb")
    if rotate is None or not is_one_of(rotate, ("llama.apply_rotary_pos_emb",)):
        return None
    halves = _global(rotate, "rotate_half")
    if halves is None or not is_one_of(halves, ("llama.rotate_half",)):
        return None
    unit_offset = is_one_of(norm, UNIT_OFFSET_NORMS)
    if not unit_offset and not is_one_of(norm, NORMS):
        return None
    for sandwiched, layers in ((False, PRE_NORM), (True, SANDWICHED)):
        if is_one_of(layer, layers):
            return LayerKind(_unit_offset_norm if unit_offset else _norm, sandwiched, unit_offset)
    return None


def is_one_of(function: Callable[..., Any], names: tuple[str, ...]) -> bool:
    """Return whether a function has the code of one of `transformers`, or its class's `forward`.

    Args:
        function: The function.
        names: Of each a family and a name in its module, such as `llama.LlamaMLP`.
    """
    own = _code(function)
    return own is not None and any(_is_same(own, _code(_found(name))) for name in names)


def _found(name: str) -> Any:
    family, name = name.split(".")
    place = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = getattr(place, name)
    return getattr(found, "forward", found)


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _global(function: Any, name: str) -> Any:
    return inspect.unwrap(function).__globals__.get(name)


def _is_same(one: CodeType, other: CodeType | None) -> bool:
    """Return whether two functions do the same by the same names; only their places may differ."""
    return (
        other is not None
        and one.co_code == other.co_code
        and one.co_names == other.co_names
        and _constants(one) == _constants(other)
    )


def _constants(code: CodeType) -> list[Any]:
    """Return a function's constants but for its docstring, which comes first."""
    return [one for one in code.co_consts if not (isinstance(one, str) and "\n" in one)]
