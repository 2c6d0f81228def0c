"""Layers of a configuration's decoder that have not been trained: what a draft begins with."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.functional.placement import on_no_device
from fastvlm.language.structure import find_part

MAX_LAYERS = 1024
"""Layers of the deepest decoder that is built from a configuration alone."""


@torch.no_grad()
def untrained_layers(
    config: PreTrainedConfig,
    number: int,
    first_index: int,
    path: str | None = None,
    kind: Callable[..., Any] | None = None,
) -> nn.ModuleList:
    """Return the last layers of a configuration's decoder, untrained.

    Args:
        config: The configuration, which is left as it is.
        number: How many layers.
        first_index: What they cache as: layers from this one on.
        path: Where a model of the configuration has its layers; None for itself.
        kind: The class of that model; None for the one that `transformers` has for it.

    Raises:
        InputError: There are more layers than any model has.
    """
    depth: int = config.num_hidden_layers
    if depth > MAX_LAYERS:
        raise InputError(f"A decoder of {depth:,} layers is not one that can be built.")
    # On no device, as large as it is: of which class each layer is depends on its place.
    with on_no_device():
        shell = (kind or decoder_class(config))(copy.deepcopy(config))
    found: Any = find_part(shell, "layers") if path is None else shell.get_submodule(path)
    layers: nn.ModuleList = found[-number:]
    device = torch.get_default_device()
    if device.type != "meta":
        layers.to_empty(device=device).apply(shell._init_weights)
    for offset, layer in enumerate(layers):
        for part in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if hasattr(part, name):
                    setattr(part, name, first_index + offset)
    return layers


def decoder_class(config: PreTrainedConfig) -> Any:
    """Return the class of a configuration's decoder, found without naming each.

    Raises:
        InputError: There is none.
    """
    if type(config) in MODEL_MAPPING:
        return MODEL_MAPPING[type(config)]
    # Decoders that only stand in larger models lie beside their configuration.
    place = type(config).__module__.replace(".configuration_", ".modeling_")
    for found in vars(importlib.import_module(place)).values():
        whole = isinstance(found, type) and issubclass(found, PreTrainedModel)
        abstract = whole and found.__name__.endswith("PreTrainedModel")
        if whole and not abstract and getattr(found, "config_class", None) is type(config):
            return found
    raise InputError(f"transformers has no decoder for {type(config).__name__}.")
