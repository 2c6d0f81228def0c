"""The imitation network: from the exit layer's hidden states to the last layer's.

(FastVLM, Bajpai and Hanawal, arXiv 2510.22641, section 3.) The final norm and the LM head are the
target's own; the network alone is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from fastvlm.functional.errors import InputError, shortened
from fastvlm.functional.placement import moved
from fastvlm.language.cache import KeyValueCache
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.dense import copy_weights, is_alike
from fastvlm.language.families import family
from fastvlm.language.positions import Positions

NETWORK_KINDS = ("block", "mlp")
BLOCK_ENDS = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "c_proj")
"""What a block's attention and its feed-forward part end in, as families name it."""
PARTS_OF_A_BLOCK = 2
TRIED, TOLERANCE = 4, 1e-3
"""Positions of a trial, and by how much results may differ that should be the same."""


class ImitationConfig(PreTrainedConfig):
    """Configuration of an imitation network.

    Args:
        kind: `block`: decoder layers of the target's own kind, with their own cache. `mlp`: the
            paper's norm, gated feed-forward network and residual, per token.
        exit_layer: Layers of the target that run before the network (k).
        blocks: Decoder layers in a network of kind `block`.
        text_config: The configuration of the target's decoder.
        target: The target's fingerprint; see `fastvlm.drafting.fingerprint`.
        num_speculative_tokens: The maximum number of tokens in a draft; None for the default.
        confidence: The drafter's own probability below which a draft ends, 0 for drafts of fixed
            length; None for a length that adapts to the machine and to the acceptance rate.
    """

    model_type = "fastvlm_imitation"

    kind: str = "block"
    exit_layer: int = 1
    blocks: int = 1
    text_config: dict[str, Any] | None = None
    target: str | None = None
    draft_vocabulary_size: int | None = None
    num_speculative_tokens: int | None = None
    confidence: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the shape.

        Raises:
            InputError: The kind is unknown, or a number is out of range.
        """
        if not isinstance(self.kind, str) or self.kind not in NETWORK_KINDS:
            raise InputError(
                f"An imitation network is one of {', '.join(NETWORK_KINDS)}; got {self.kind}."
            )
        if not is_count(self.exit_layer) or not is_count(self.blocks):
            raise InputError(
                "An imitation network needs an exit layer and blocks of at least 1; got"
                f" {shortened(repr(self.exit_layer))} and {shortened(repr(self.blocks))}."
            )
        most = self.num_speculative_tokens
        if most is not None and not is_count(most):
            raise InputError(f"num_speculative_tokens is at least 1; got {shortened(repr(most))}.")
        least = self.confidence
        if least is not None and not (type(least) in (int, float) and 0 <= least <= 1):
            raise InputError(f"confidence lies between 0 and 1; got {shortened(repr(least))}.")
        super().__post_init__(**kwargs)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return type(value) is int and value >= 1


class GatedMlp(nn.Module):
    """The paper's network: x + down(silu(gate(norm(x))) * up(norm(x))), per token.

    Args:
        width: Size of its inputs and outputs (d_model).
        hidden: Size of its hidden layer.
        eps: Epsilon of its RMSNorm.
    """

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Approximate the last layer's hidden states: (batch, new, d_model) to the same."""
        normed = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class ImitationNetwork(PreTrainedModel):
    """Approximates the last layer's hidden states of a target from those of its exit layer.

    A draft's directory is this model saved with `save_pretrained`.
    """

    config: ImitationConfig
    config_class = ImitationConfig
    base_model_prefix = "imitation"
    draft_vocabulary: Tensor | None

    def __init__(self, config: ImitationConfig) -> None:
        super().__init__(config)
        if config.text_config is None:
            raise InputError("An imitation network's configuration needs the target's text_config.")
        text = AutoConfig.for_model(**config.text_config)
        self.family = family(text.model_type)
        shape = self.family.shape(text)
        self.depth = shape.depth
        if config.exit_layer >= self.depth:
            raise InputError(
                f"The exit layer must be below the target's {self.depth} layers;"
                f" got {config.exit_layer}."
            )
        if config.kind == "block":
            self.layers = self.family.blocks(text, config.blocks, first_index=self.depth)
            self.mlp = None
        else:
            self.layers = nn.ModuleList()
            self.mlp = GatedMlp(shape.width, shape.hidden, shape.eps)
        size = config.draft_vocabulary_size
        # The token that each row of the restricted head stands for.
        self.register_buffer(
            "draft_vocabulary", None if size is None else torch.zeros(size, dtype=torch.long)
        )
        self.post_init()

    @property
    def cache_layers(self) -> int:
        """Layers that the network adds to the decoder's cache."""
        return len(self.layers)

    def implement_as(self, own: Any) -> Self:
        """Compute attention and experts as a target does: sdpa, eager, ...

        Args:
            own: The configuration of the target's decoder.
        """
        for part in self.layers.modules():
            for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
                if hasattr(part, "config") and hasattr(own, name):
                    setattr(part.config, name, getattr(own, name))
        return self

    def imitate(
        self, x: Tensor, positions: Positions, cache: KeyValueCache, decoder: SplitDecoder
    ) -> Tensor:
        """Approximate the last layer's hidden states from the exit layer's.

        Args:
            x: The exit layer's hidden states, (batch, new, d_model).
            positions: Their positions.
            cache: Where the network's own layers keep their keys and values.
            decoder: The target's decoder.

        Returns:
            (batch, new, d_model).
        """
        if self.mlp is not None:
            return self.mlp(x)
        return decoder.forward_blocks(x, positions, cache, self.layers, self.config.exit_layer)


def initialise_from(network: ImitationNetwork, layers: Sequence[nn.Module]) -> None:
    """Initialise a network from the target's layers that it replaces.

    A `block` takes the layers from the exit layer on (so a draft with as many blocks as the target
    has layers left is the target itself), each the next one of its own kind. An `mlp` takes the
    first one's feed-forward part, if that is gated like its own; otherwise it starts as the
    identity, which is early exit.

    Args:
        network: The network to initialise.
        layers: All of the target's layers, in order; they may be quantised or adapted.

    Raises:
        InputError: A layer is offloaded, or isn't of the form that the configuration says.
    """
    first = network.config.exit_layer
    if any(weight.is_meta for layer in layers[first:] for weight in layer.parameters()):
        raise InputError(
            "A draft starts from the weights of the target's last layers, which are offloaded here:"
            " load the target whole to train a draft for it."
        )
    if network.mlp is not None:
        found = network.family.feed_forward(layers[first])
        with torch.no_grad():
            if found is None:
                network.mlp.down_proj.weight.zero_()
                return
            network.mlp.norm.weight.copy_(found.norm)
            network.mlp.gate_proj.weight.copy_(found.gate)
            network.mlp.up_proj.weight.copy_(found.up)
            network.mlp.down_proj.weight.copy_(found.down)
        return
    place = first
    for block in network.layers:
        if place == len(layers):
            return
        # Where layers are of several kinds, the blocks are of the kinds of the last ones.
        here = range(place, len(layers))
        place = next((one for one in here if is_alike(block, layers[one])), place)
        if not is_alike(block, layers[place]):
            raise InputError(
                f"A draft's layer can't start from layer {place} of the target, which has other"
                " parts than its configuration says."
            )
        copy_weights(block, layers[place])
        place += 1


@torch.no_grad()
def grown(network: ImitationNetwork, blocks: int, decoder: SplitDecoder) -> ImitationNetwork:
    """Return a network with further blocks, which add nothing yet: it drafts as it did.

    Each is the last one but for what its attention and its feed-forward part end in, which is 0.

    Args:
        network: A network of kind `block`, where the decoder is, in evaluation mode.
        blocks: How many it is to have: more than it has.
        decoder: The target's decoder.

    Raises:
        InputError: It has no blocks, or such as don't add what they compute to what they are given.
    """
    if not network.layers:
        raise InputError("A network of kind mlp has no blocks that others could follow.")
    config = type(network.config).from_dict({**network.config.to_dict(), "blocks": blocks})
    own = next(network.parameters())
    found = moved(ImitationNetwork(config), own.device, own.dtype)
    # Dropout, which OPT has, would tell it from the other in the trial.
    found.implement_as(decoder.decoder.config).eval()
    held, last = len(network.layers), network.layers[-1]
    found.load_state_dict(network.state_dict(), strict=False)
    add_nothing = True
    for block in found.layers[held:]:
        copy_weights(block, last)
        named = block.named_modules()
        ends = [part for name, part in named if name.rpartition(".")[2] in BLOCK_ENDS]
        add_nothing &= len(ends) == PARTS_OF_A_BLOCK
        for parameter in (one for part in ends for one in part.parameters()):
            parameter.zero_()
    if not (add_nothing and _imitate_alike(network, found, decoder)):
        raise InputError(
            f"Blocks like {type(last).__name__} don't begin as ones that add nothing: train a new"
            " network with as many."
        )
    return found


def _imitate_alike(one: ImitationNetwork, other: ImitationNetwork, decoder: SplitDecoder) -> bool:
    """Return whether two networks make the same of some states."""
    x = torch.randn(1, TRIED, decoder.width, generator=torch.Generator().manual_seed(0))
    device, dtype = decoder.device_and_dtype()
    made = []
    for network in (one, other):
        cache = decoder.cache(1, TRIED)
        made.append(
            network.imitate(x.to(device, dtype), cache.positions([0], TRIED), cache, decoder)
        )
    return torch.allclose(made[0], made[1], rtol=TOLERANCE, atol=TOLERANCE)


AutoConfig.register("fastvlm_imitation", ImitationConfig, exist_ok=True)
AutoModel.register(ImitationConfig, ImitationNetwork, exist_ok=True)
