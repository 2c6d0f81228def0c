"""Hold a decoder of ONNX Runtime against the same in torch, before it decodes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError, first_line
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.decoder_inputs import OUTSIDE, DecoderInputs
from fastvlm.language.verification import ordinary_tokens
from fastvlm.runtimes.onnx_decoder import OnnxDecoder

PROMPTS = (9, 6)
"""Positions of the prompts of the check."""
REPLY = 4
"""Positions that follow each in one pass."""
BLOCK = slice(1, 4)
"""Positions of the second prompt that see one another, as those of an image may."""
TOLERANCE = 1e-3
"""The greatest error of a state or a logit, as a share of the spread of what it belongs to."""


def verified(decoder: OnnxDecoder) -> OnnxDecoder:
    """Return a decoder whose states and logits were found to be those of torch.

    One with weights of fewer bits is checked by its layers in float32, one of each kind: rounding
    is all that tells them apart. Its head is a norm, which is checked where it is read, and a
    product.

    Raises:
        InputError: They differ, or it can't be run.
    """
    layers: Sequence[int] = range(decoder.depth)
    checked = decoder
    if decoder.bits is not None:
        checked = OnnxDecoder(decoder.split)
        layers = sorted({checked.kind(number): number for number in reversed(layers)}.values())
    axes = 3 if any(kind.axes for kind in decoder.split.rotary) else 1
    try:
        with torch.no_grad():
            wanted, found = (
                _outputs(one, layers, axes, head=checked is decoder)
                for one in (decoder.split, checked)
            )
    except InputError:
        raise
    except Exception as error:  # of ONNX Runtime's own many kinds
        raise decoder.refusal(first_line(error)) from error
    for own, other in zip(wanted, found, strict=True):
        worst = float(((other - own).abs().amax(-1) / own.std(-1).clamp(min=1e-30)).max())
        if not worst <= TOLERANCE:
            raise decoder.refusal(
                f"its states differ from those in torch by {worst:.1%} of their spread"
            )
    return decoder


def _outputs(split: SplitDecoder, layers: Sequence[int], axes: int, *, head: bool) -> list[Tensor]:
    """Return states of passes of all kinds, and logits of the last: (..., size) each.

    Args:
        split: The decoder.
        layers: The layers to run.
        axes: How many numbers say where a position is.
        head: Whether logits are made too.
    """
    longest = PROMPTS[0] + REPLY + 1
    tokens = ordinary_tokens(split.model, 2 * longest).view(2, longest)
    cache = split.cache(2, longest + 1)
    found = []
    for slot, length in enumerate(PROMPTS):
        prompt = tokens[slot, :length]
        x = split.embed(prompt[None])
        cache.assign(slot, _with_block(prompt, x[0], axes) if slot else _plain(prompt, x[0]))
        positions = cache.positions([0], length, [slot])
        found.append(split.forward_layers(x, positions, cache, layers))
    replies = [row[length : length + REPLY] for row, length in zip(tokens, PROMPTS, strict=True)]
    x = split.embed(torch.stack(replies))
    found.append(split.forward_layers(x, cache.positions(PROMPTS, REPLY), cache, layers))
    x = split.embed(tokens[:1, longest - 1 :])
    x = split.forward_layers(x, cache.positions([longest - 1], 1, [0]), cache, layers)
    return [*found, x, split.head(x)] if head else [*found, x]


def _plain(prompt: Tensor, embeddings: Tensor) -> DecoderInputs:
    return DecoderInputs(prompt.tolist(), embeddings)


def _with_block(prompt: Tensor, embeddings: Tensor, axes: int) -> DecoderInputs:
    """Return a prompt with positions that see one another, and lie side by side on other axes."""
    length = len(prompt)
    blocks = torch.full((length,), OUTSIDE)
    blocks[BLOCK] = 0
    places = torch.arange(length).repeat(axes, 1)
    places[1:, BLOCK] = places[1:, BLOCK.start : BLOCK.start + 1] + torch.arange(axes - 1)[:, None]
    return DecoderInputs(prompt.tolist(), embeddings, places, blocks=blocks)
