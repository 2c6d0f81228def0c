"""What a decoder layer computes, read from its modules: the usual form, of any family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.functional.errors import InputError
from fastvlm.language.dense import dense_weight
from fastvlm.language.masks import MaskKind

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""The activations that are known, told apart by what they compute."""
TOLERANCE = 1e-5
"""The greatest relative error by which a norm or an activation is recognised."""
NORMS = {
    "before_attention": ("input_layernorm",),
    "after_attention": ("post_self_attn_layernorm",),
    "before_mlp": ("pre_feedforward_layernorm",),
    "after_mlp": ("post_feedforward_layernorm", "post_mlp_layernorm"),
}
"""What families call a layer's norms; `post_attention_layernorm` is one of two of them."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last axis.

    Args:
        weight: What the normed values are multiplied by: (width,).
        bias: What is added then; None for a norm of the root mean square, which shifts nothing.
        eps: What is added to the variance.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer: (outputs, inputs) and, where there is one, its bias (outputs,)."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """A layer's attention.

    Args:
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: Size of each.
        scale: What scores are multiplied by.
        softcap: At what scores are soft-capped; 0 for not at all.
        qkv: To queries, keys and values, one after another.
        q_norm: Over each head of the queries, or over all of them; None for none.
        k_norm: The same of the keys.
        out: From the heads' outputs to the states.
        cache_index: What the layer caches as.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    qkv: Product
    q_norm: Norm | None
    k_norm: Norm | None
    out: Product
    cache_index: int


@dataclass(frozen=True, slots=True)
class LayerForm:
    """A layer: attention and a gated feed-forward part, each with norms and a residual.

    Args:
        norms: By their places, see `NORMS`; places without one are left out.
        attention: The attention.
        gate_up: To gate and values, one after another: (2 hidden, d_model).
        activation: Of the gate, one of `ACTIVATIONS`.
        down: From there: (d_model, hidden).
    """

    norms: dict[str, Norm]
    attention: AttentionForm
    gate_up: Product
    activation: str
    down: Product

    @property
    def kind(self) -> tuple[object, ...]:
        """What tells it from layers that are computed otherwise, their weights aside."""
        own = self.attention
        norms = [*self.norms.items(), ("q", own.q_norm), ("k", own.k_norm)]
        products = (own.qkv, own.out, self.gate_up, self.down)
        return (
            tuple(
                (place, norm.bias is None, norm.eps, len(norm.weight))
                for place, norm in norms
                if norm is not None
            ),
            (own.heads, own.kv_heads, own.head_dim, own.scale, own.softcap, self.activation),
            tuple(one.bias is None for one in products),
        )


@dataclass(frozen=True, slots=True)
class Rotation:
    """How queries and keys are rotated.

    Args:
        number: Of the rotations, among those of the decoder.
        size: Values of each head that are rotated, from the first on.
        interleaved: Whether neighbouring values are rotated, rather than those half a size apart.
    """

    number: int
    size: int
    interleaved: bool

    @property
    def tables(self) -> tuple[str, str]:
        """Names of the tables of cosines and of sines."""
        return f"cos{self.number}", f"sin{self.number}"


@dataclass(frozen=True, slots=True)
class GraphLayer:
    """A layer of a graph.

    Args:
        form: What it computes.
        rotation: How it rotates queries and keys.
        mask: What it sees.
    """

    form: LayerForm
    rotation: Rotation
    mask: MaskKind

    @property
    def width(self) -> int:
        """Size of the hidden states."""
        return len(self.form.down.weight)


@torch.no_grad()
def layer_form(layer: nn.Module) -> LayerForm:
    """Return what a layer computes.

    Quantised and adapted weights are read as what they stand for.

    Raises:
        InputError: The layer is of another form; it says what is in the way.
    """
    reading = _Reading(layer)
    found = LayerForm(
        reading.norms(),
        reading.attention(),
        reading.product("mlp", "gate_up_proj") or reading.products("mlp", ("gate_proj", "up_proj")),
        reading.activation(),
        reading.needed("mlp", "down_proj"),
    )
    reading.check_all_read()
    return found


@torch.no_grad()
def norm_form(norm: nn.Module) -> Norm:
    """Return what a norm computes.

    Raises:
        InputError: It is neither a layer norm nor one of the root mean square, or lies elsewhere.
    """
    check_is_here(norm)
    weight: Any = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm):
        ones = torch.ones(norm.normalized_shape)
        bias = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach().float()
        return Norm(ones if weight is None else weight.detach().float(), bias, norm.eps)
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if isinstance(weight, Tensor) and weight.dim() == 1 and eps is not None:
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        # In 16 bits it would round.
        exact = norm if weight.dtype == x.dtype else deepcopy(norm).float()
        found = exact(x)
        # Some families multiply by 1 + weight.
        for scale in (weight.detach().float(), 1 + weight.detach().float()):
            if torch.allclose(found, normed * scale, rtol=TOLERANCE, atol=TOLERANCE):
                return Norm(scale, None, eps)
    raise InputError(f"its {type(norm).__name__} is not a norm that is known")


@torch.no_grad()
def linear_form(linear: Any) -> Product:
    """Return what a linear layer computes, in float32.

    Raises:
        InputError: It doesn't say how wide its inputs are, or lies elsewhere.
    """
    check_is_here(linear)
    width: int | None = getattr(linear, "in_features", None)
    if width is None:
        raise InputError(f"its {type(linear).__name__} is not a linear layer")
    weight = dense_weight(linear, width, torch.zeros(())).float()
    bias: Any = getattr(linear, "bias", None)
    return Product(weight, None if bias is None else bias.detach().float())


def check_is_here(module: nn.Module) -> None:
    """Refuse weights that are offloaded: they are not here until they are needed.

    Raises:
        InputError: They are.
    """
    if any(weight.is_meta for weight in module.parameters()):
        raise InputError("its weights are offloaded")


class _Reading:
    """A layer's modules, and which of its weights have been read."""

    def __init__(self, layer: nn.Module) -> None:
        self.parts: dict[str, Any] = dict(layer.named_modules())
        self.unread = {name for name, _ in layer.named_parameters()}

    def find(self, name: str) -> Any:
        """Return a module, whose weights count as read; None where there is none."""
        part = self.parts.get(name)
        if part is not None:
            self.unread = {one for one in self.unread if not one.startswith(f"{name}.")}
        return part

    def norm(self, name: str) -> Norm | None:
        """Return a norm; None where there is none."""
        part = self.find(name)
        return None if part is None else norm_form(part)

    def norms(self) -> dict[str, Norm]:
        """Return the layer's norms by their places."""
        names = {
            place: next((n for n in some if n in self.parts), "") for place, some in NORMS.items()
        }
        after = names["after_mlp"] and not names["before_mlp"] and not names["after_attention"]
        both = names["before_mlp"] or after
        names["after_attention" if both else "before_mlp"] = "post_attention_layernorm"
        found = {place: self.norm(name) for place, name in names.items() if name}
        return {place: norm for place, norm in found.items() if norm is not None}

    def product(self, part: str, name: str) -> Product | None:
        """Return a linear layer; None where there is none."""
        linear = self.find(f"{part}.{name}")
        return None if linear is None else linear_form(linear)

    def needed(self, part: str, name: str) -> Product:
        """Return a linear layer.

        Raises:
            InputError: There is none.
        """
        found = self.product(part, name)
        if found is None:
            raise InputError(f"it has no linear {part}.{name}")
        return found

    def products(self, part: str, names: Sequence[str]) -> Product:
        """Return linear layers of the same inputs as one, whose outputs follow one another."""
        each = [self.needed(part, name) for name in names]
        biases = [one.bias for one in each if one.bias is not None]
        if biases and len(biases) < len(each):
            biases = [
                one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias
                for one in each
            ]
        return Product(
            torch.cat([one.weight for one in each]), torch.cat(biases) if biases else None
        )

    def attention(self) -> AttentionForm:
        """Return the layer's attention."""
        name = "self_attn"
        attention = self.parts.get(name)
        head_dim: Any = getattr(attention, "head_dim", None)
        scale: Any = getattr(attention, "scaling", None)
        index: Any = getattr(attention, "layer_idx", None)
        if not isinstance(head_dim, int) or not isinstance(scale, float) or index is None:
            raise InputError(
                "its attention doesn't say its heads' size and scale under the usual names"
            )
        out = next(
            (one for one in ("o_proj", "out_proj", "dense") if f"{name}.{one}" in self.parts), ""
        )
        down = self.needed(name, out)
        qkv = self.product(name, "qkv_proj") or self.products(name, ("q_proj", "k_proj", "v_proj"))
        heads = down.weight.shape[1] // head_dim
        return AttentionForm(
            heads,
            (len(qkv.weight) // head_dim - heads) // 2,
            head_dim,
            scale,
            float(getattr(attention, "attn_logit_softcapping", None) or 0),
            qkv,
            self.norm(f"{name}.q_norm"),
            self.norm(f"{name}.k_norm"),
            down,
            index,
        )

    def activation(self) -> str:
        """Return what the feed-forward part's gate goes through."""
        mlp = self.parts.get("mlp")
        names = ("act_fn", "activation_fn", "act")
        act: Any = next((found for name in names if (found := getattr(mlp, name, None))), None)
        x = torch.linspace(-6, 6, 101)
        for name, known in ACTIVATIONS.items():
            if act is not None and torch.allclose(act(x), known(x), rtol=TOLERANCE, atol=TOLERANCE):
                return name
        raise InputError("its feed-forward part has no activation that is known")

    def check_all_read(self) -> None:
        """Refuse weights that nothing has been made of.

        Raises:
            InputError: There are some.
        """
        if self.unread:
            raise InputError(f"it has {', '.join(sorted(self.unread)[:3])}, which is not known")
