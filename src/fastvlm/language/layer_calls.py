"""How a decoder calls each of its layers, seen by running it with layers that only take notes.

Masks, rotations and arguments differ from family to family, and from release to release of
`transformers`. What a decoder's own `forward` hands its layers says all of it, for any family.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastvlm.functional.errors import InputError, first_line
from fastvlm.language.example_source import example_source
from fastvlm.language.masks import FULL, MaskKind
from fastvlm.language.structure import find_part, part_name

LENGTH = 8
"""Positions of the pass that is observed."""
SIZE = 3
"""Window and chunk of that pass, so that each kind of mask shows within its length."""
SIZES = ("sliding_window", "attention_chunk_size")
CACHE_NAMES = ("past_key_values", "layer_past", "cache")
"""What models and their layers call their cache, by family and release of `transformers`."""
HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
"""Arguments that change no hidden state."""
GIVEN = frozenset(
    {
        "attention_mask",
        "cross_attention_mask",
        "cross_attention_states",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "full_text_row_masked_out_mask",
        "position_embeddings",
        "position_ids",
        "use_cache",
        *CACHE_NAMES,
    }
)
"""Arguments that we give layers."""


class RotaryKind(NamedTuple):
    """Which rotations a layer is given.

    Args:
        module: The name of the decoder's module that makes them.
        layer_type: The kind of layer that the module is told; None where it is told none.
        axes: Whether it is given time, height and width: (3, batch, width).
    """

    module: str
    layer_type: str | None = None
    axes: bool = False


class LayerCall(NamedTuple):
    """How a layer is called.

    Args:
        mask: What its attention sees.
        rotary: The rotations that it is given; None for none.
        names: The arguments that it is given beside the hidden states.
    """

    mask: MaskKind = FULL
    rotary: RotaryKind | None = None
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DecoderCalls:
    """How a decoder calls its layers.

    Args:
        layers: How each is called.
        entry: What is done to embeddings before the first: `nothing`, `scale` (by the decoder's
            `embedding_multiplier`), `root` (by the root of their width) or `norm` (the final one).
    """

    layers: tuple[LayerCall, ...]
    entry: str = "nothing"


@dataclass(slots=True)
class _Notes:
    """What was seen of a pass: layers with their arguments, rotary modules with what they gave."""

    layers: list[tuple[_NotingLayer, dict[str, Any]]] = field(default_factory=list)
    rotary: list[tuple[RotaryKind, Any]] = field(default_factory=list)


class _NotingLayer(nn.Module):
    """Stands for a layer: it notes its arguments, and returns the hidden states as they are."""

    def __init__(self, layer: nn.Module, notes: _Notes, *, in_tuple: bool = False) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        # In a list, or it would become a part of this module.
        self.stands_for, self.notes = [layer], notes
        taken = inspect.signature(type(layer).forward).parameters
        self.names = list(taken)[1:]
        self.required = [
            name
            for name in self.names[1:]
            if taken[name].default is taken[name].empty
            and taken[name].kind is taken[name].POSITIONAL_OR_KEYWORD
        ]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.notes.layers.append((self, named))
        x = named[self.names[0]]
        return (x, None) if self.in_tuple else x


class _NotingRotary(nn.Module):
    """Stands for a rotary module: it notes what it is asked for, and what that gave."""

    def __init__(self, name: str, module: nn.Module, notes: _Notes) -> None:
        super().__init__()
        self.name, self.stands_for, self.notes = name, [module], notes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"][0], name)

    def forward(self, x: Tensor, position_ids: Tensor, *kind: Any, **named: Any) -> Any:
        found = self.stands_for[0](x, position_ids, *kind, **named)
        layer_type = next((one for one in (*kind, *named.values()) if isinstance(one, str)), None)
        axes = position_ids.dim() == 3  # noqa: PLR2004 (axes, batch, width)
        self.notes.rotary.append((RotaryKind(self.name, layer_type, axes), found))
        return found


@torch.no_grad()
def observe_calls(
    decoder: Any,
    enter: Callable[[Tensor], Tensor] | None = None,
    extras: Collection[str] = (),
) -> DecoderCalls:
    """Return how a decoder calls its layers. No layer is run, and the decoder is left as it is.

    Args:
        decoder: The decoder, as `transformers` made it: a module with `embed_tokens` and `layers`.
        enter: What it does to the embeddings of the first positions before its first layer; None
            for what every family may do.
        extras: Arguments beside the usual ones that layers may be given.

    Raises:
        InputError: It hands its layers something that fastvlm doesn't know, or changes embeddings
            otherwise.
    """
    weight = next(find_part(decoder, "embed_tokens").parameters())
    torch_random = torch.Generator().manual_seed(0)
    # Meta tensors lie nowhere until they are needed; accelerate then computes on a device.
    device = "cpu" if weight.is_meta else weight.device
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(1, LENGTH, decoder.config.hidden_size, generator=torch_random).to(device, dtype)
    try:
        notes = _observe(decoder, x)
    except Exception as error:  # whatever a family's own code stumbles over
        raise InputError(
            f"{type(decoder).__name__} can't be observed, so fastvlm can't split it:"
            f" {first_line(error)}."
        ) from error
    layers = find_part(decoder, "layers")
    if len(notes.layers) != len(layers):
        raise InputError(
            f"{type(decoder).__name__} runs {len(notes.layers)} layers, but has"
            f" {len(layers)}; fastvlm can't split it."
        )
    cached = cached_windows(decoder.config)
    calls = [
        _call(decoder, index, notes, cached[index] if index < len(cached) else None, extras)
        for index in range(len(layers))
    ]
    first, named = notes.layers[0]
    entered = named[first.names[0]]
    if enter is None:
        return DecoderCalls(tuple(calls), _entry(decoder, x, entered))
    if not torch.equal(enter(x), entered):
        raise _changed(decoder)
    return DecoderCalls(tuple(calls))


def _observe(decoder: Any, x: Tensor) -> _Notes:
    """Return what was seen of a pass over some embeddings: (1, length, d_model)."""
    given = {
        "inputs_embeds": x,
        "attention_mask": torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
        **example_source(decoder, x),
    }
    # An instance's own `forward`, as accelerate's hooks have it, would run the decoder itself.
    run = type(decoder).forward
    notes = _Notes()
    try:
        run(_noting(decoder, notes, in_tuple=False), use_cache=False, **given)
    except IndexError:
        # Older code takes the hidden states out of a tuple.
        notes = _Notes()
        run(_noting(decoder, notes, in_tuple=True), use_cache=False, **given)
    return notes


@torch.no_grad()
def check_arguments(decoder: Any, extras: Collection[str] = ()) -> None:
    """Refuse a decoder whose layers are given what isn't known; it has no weights yet.

    What a decoder without weights can't show is seen by `observe_calls` once it has them.

    Args:
        decoder: The decoder, on the meta device.
        extras: Arguments beside the usual ones that layers may be given.

    Raises:
        InputError: A layer's argument isn't known.
    """
    notes = _Notes()
    x = torch.zeros(1, LENGTH, decoder.config.hidden_size, device="meta")
    mask = torch.ones(1, LENGTH, dtype=torch.long, device="meta")
    with suppress(Exception):
        type(decoder).forward(
            _noting(decoder, notes, in_tuple=False),
            inputs_embeds=x,
            attention_mask=mask,
            use_cache=False,
        )
    for index, (layer, named) in enumerate(notes.layers):
        where = f"Layer {index} of {type(decoder).__name__}"
        rest = {name: value for name, value in named.items() if name != layer.names[0]}
        _check_known(where, rest, extras)


def _noting(decoder: Any, notes: _Notes, *, in_tuple: bool) -> Any:
    """Return a copy of a decoder, with its own parts, that notes instead of computing layers."""
    probe = copy.copy(decoder)
    probe._modules = {
        name: _noting_rotary(name, part, notes) if "rotary" in name else part
        for name, part in decoder._modules.items()
    }
    name = part_name(decoder, "layers")
    assert name is not None  # `check_structure` comes first
    own = getattr(decoder, name)
    probe._modules[name] = nn.ModuleList(_NotingLayer(one, notes, in_tuple=in_tuple) for one in own)
    config = probe.config = copy.copy(decoder.config)
    for name in SIZES:
        if getattr(config, name, None) is not None:
            setattr(config, name, SIZE)
    # This implementation is always given a mask, and adds it to the scores.
    config._attn_implementation_internal = "eager"
    return probe


def _noting_rotary(name: str, part: Any, notes: _Notes) -> Any:
    """Return what stands for a rotary module, or for each in a container of some."""
    if isinstance(part, nn.ModuleList):
        return nn.ModuleList(
            _noting_rotary(f"{name}.{key}", one, notes) for key, one in part.named_children()
        )
    if isinstance(part, nn.ModuleDict):
        return nn.ModuleDict(
            {key: _noting_rotary(f"{name}.{key}", one, notes) for key, one in part.items()}
        )
    return None if part is None else _NotingRotary(name, part, notes)


def cached_windows(config: Any) -> list[int | None]:
    """Return how many positions the cache of `generate` keeps for each layer; None for all."""
    layers: Any = DynamicCache(config=config).layers
    return [getattr(layer, "sliding_window", None) for layer in layers]


def _call(
    decoder: Any,
    index: int,
    notes: _Notes,
    cached: int | None,
    extras: Collection[str],
) -> LayerCall:
    """Return how a layer is called, by what it was given and what the cache keeps for it."""
    where = f"Layer {index} of {type(decoder).__name__}"
    layer, named = notes.layers[index]
    rest = {name: value for name, value in named.items() if name != layer.names[0]}
    _check_known(where, rest, extras)
    rotations = rest.get("position_embeddings")
    kind = None
    if rotations is not None:
        kind = next((kind for kind, found in notes.rotary if found is rotations), None)
        if kind is None:
            raise InputError(f"{where} is given rotations that fastvlm can't tell the origin of.")
    mask = _mask_kind(decoder.config, where, rest.get("attention_mask"))
    return LayerCall(
        MaskKind(kept=cached) if mask == FULL else mask,
        kind,
        frozenset(rest) & (GIVEN | set(extras)) | frozenset(layer.required),
    )


def _check_known(where: str, given: dict[str, Any], extras: Collection[str]) -> None:
    """Refuse arguments of a layer that aren't known."""
    known = {*GIVEN, *HARMLESS, *extras}
    unknown = sorted(
        name
        for name, value in given.items()
        if name not in known and value is not None and value is not False
    )
    if unknown:
        raise InputError(
            f"{where} is given {', '.join(unknown)}, which fastvlm doesn't know, so it can't split"
            " the decoder; decode the model with transformers' own generate."
        )


def _mask_kind(config: Any, where: str, mask: Any) -> MaskKind:
    """Return what a layer sees, by the mask that it was given with small windows and chunks."""
    if mask is None:
        return FULL
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (LENGTH, LENGTH):
        raise InputError(f"{where} is given a mask of a form that fastvlm doesn't know.")
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    places = torch.arange(LENGTH, device=mask.device)
    window, chunk = (getattr(config, name, None) for name in SIZES)
    known: Sequence[tuple[MaskKind, MaskKind]] = (
        (FULL, FULL),
        (MaskKind(window=SIZE), MaskKind(window=window)),
        (MaskKind(chunk=SIZE), MaskKind(chunk=chunk)),
    )
    for shown, own in known:
        if bool((seen[0, 0] == shown.visible(places[:, None], places)).all()):
            return own
    raise InputError(f"{where} attends in a pattern that fastvlm doesn't know.")


def _entry(decoder: Any, x: Tensor, entered: Tensor) -> str:
    """Return what was done to embeddings before the first layer."""
    if torch.equal(x, entered):
        return "nothing"
    factor = getattr(decoder, "embedding_multiplier", None)
    if factor is not None and torch.equal(x * factor, entered):
        return "scale"
    if torch.equal(x * root_of_width(x), entered):
        return "root"
    if torch.equal(find_part(decoder, "norm")(x), entered):
        return "norm"
    raise _changed(decoder)


def root_of_width(x: Tensor) -> Tensor:
    """Return the root of the last size of a tensor, rounded to the tensor's precision."""
    return torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)


def _changed(decoder: Any) -> InputError:
    return InputError(
        f"{type(decoder).__name__} changes embeddings before its first layer in a way that fastvlm"
        " doesn't know, so it can't split the decoder."
    )
