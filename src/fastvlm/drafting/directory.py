"""A draft's directory: read, and checked against its target."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from fastvlm.drafting.fingerprint import difference
from fastvlm.drafting.imitation import ImitationConfig, ImitationNetwork
from fastvlm.functional.errors import CheckpointError, first_line, shortened
from fastvlm.functional.model_files import check_size, check_weight_file, read_object
from fastvlm.functional.placement import moved, on_no_device
from fastvlm.language.families import family
from fastvlm.language.structure import check_structure, device_and_dtype_of, find_part, text_decoder


def load_draft(directory: str | Path, target: PreTrainedModel) -> ImitationNetwork:
    """Load an imitation network for a target, on the target's device and in its precision.

    A draft that was made for other weights is only slow, so it is loaded with a warning.

    Args:
        directory: The draft's directory.
        target: The model that verifies; its weights may be quantised, offloaded or adapted.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: There is no draft in the directory, it is broken, or it was made for a
            decoder of another family, shape or vocabulary.
        InputError: The target's decoder is of a form that can't be split.
    """
    path = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise CheckpointError(f"There is no draft in {path}: {name} is missing.")
    kind = read_object(path / "config.json").get("model_type")
    if kind != ImitationConfig.model_type:
        raise CheckpointError(
            f"{path} holds no draft: its config.json has the model_type {shortened(repr(kind))},"
            f" and a draft's is {ImitationConfig.model_type!r}."
        )
    check_weight_file(path / "model.safetensors")
    try:
        config = ImitationConfig.from_pretrained(path)
        with on_no_device():
            shell = ImitationNetwork(config)
        check_size(path / "config.json", [path / "model.safetensors"], shell)
        # transformers' annotation knows the model alone, not the pair that this option gives.
        loaded: Any = ImitationNetwork.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"The draft in {path} can't be read: {first_line(error)}.") from error
    network: ImitationNetwork = loaded[0]
    found: dict[str, set[str]] = loaded[1]
    # transformers fills what is missing with random weights.
    for what in ("missing", "unexpected"):
        if keys := found[f"{what}_keys"]:
            raise CheckpointError(
                f"The draft in {path} can't be read: {', '.join(sorted(keys))}"
                f" {'is' if len(keys) == 1 else 'are'} {what}."
            )
    for what, drafted, own in unfit(network, target):
        raise CheckpointError(
            f"The draft in {path} doesn't fit this model: {what} is {drafted} for the draft and"
            f" {own} in the model."
        )
    if reason := difference(network.config.target, target):
        warnings.warn(
            f"The draft in {path} may have been made for other weights, and then drafts worse:"
            f" {reason}.",
            stacklevel=2,
        )
    # Whether the target can be split is seen when it is, which computes; here its parts are enough.
    decoder = text_decoder(target)
    check_structure(decoder, ("embed_tokens",))
    network.implement_as(decoder.config)
    return moved(network, *device_and_dtype_of(find_part(decoder, "embed_tokens"))).eval()


def unfit(network: ImitationNetwork, target: PreTrainedModel) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings in which a network's decoder differs from a target's, with both values.

    Raises:
        InputError: The family of the target's decoder is not supported.
    """
    own = text_decoder(target).config
    made_for = AutoConfig.for_model(**(network.config.text_config or {}))
    name, own_name = (config.model_type.removesuffix("_text") for config in (made_for, own))
    if name != own_name:
        yield "the decoder's family", name, own_name
        return
    shape, own_shape = network.family.shape(made_for), family(own_name).shape(own)
    compared: list[tuple[str, Any, Any]] = [
        ("the number of layers", shape.depth, own_shape.depth),
        ("the hidden states' size", shape.width, own_shape.width),
    ]
    if network.cache_layers:
        # A block's states lie in the target's cache.
        (heads, size), (own_heads, own_size) = cached_heads(made_for), cached_heads(own)
        compared += [
            ("the number of key-value heads", heads, own_heads),
            ("the heads' size", size, own_size),
        ]
    yield from (row for row in compared if row[1] != row[2])
    if network.draft_vocabulary is not None:
        needed, size = int(network.draft_vocabulary.max()) + 1, vocabulary_size(target)
        if needed > size:
            yield "the vocabulary's size", f"{needed} or more", size


def cached_heads(config: Any) -> tuple[int, int]:
    """Return the number and the size of the key-value heads of a decoder's configuration."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size


def vocabulary_size(target: PreTrainedModel) -> int:
    """Return the vocabulary size of a model's LM head."""
    head: Any = target.get_output_embeddings()
    size = getattr(head, "out_features", None)
    return text_decoder(target).config.vocab_size if size is None else size
