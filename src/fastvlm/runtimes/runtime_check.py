"""Hold a decoder of another runtime against the same in torch, before it decodes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlm.functional.errors import InputError, first_line
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.decoder_inputs import OUTSIDE, DecoderInputs
from fastvlm.language.verification import COARSE_TOLERANCE, ordinary_tokens
from fastvlm.runtimes.wrapped_decoder import WrappedDecoder

PROMPTS = (9, 6)
"""Positions of the prompts of the check."""
REPLY = 4
"""Positions that follow each in one pass."""
BLOCK = slice(1, 4)
"""Positions of the second prompt that see one another, as those of an image may."""
TOLERANCE = 1e-3
"""The greatest error of a state or a logit, as a share of the spread of what it belongs to."""


def check(decoder: WrappedDecoder, layers: Sequence[int], *, head: bool = True) -> None:
    """Refuse a decoder whose states or logits are not those of torch.

    Args:
        decoder: The decoder.
        layers: The layers to run.
        head: Whether the LM head is run too.

    Raises:
        InputError: They differ, or it can't be run.
    """
    axes = 3 if any(kind.axes for kind in decoder.split.rotary) else 1
    try:
        # In 16 bits a token's states may round to others; most tell whether the layers are right.
        with torch.inference_mode():
            wanted, found = (
                _outputs(one, layers, axes, head=head) for one in (decoder.split, decoder)
            )
    except InputError:
        raise
    except Exception as error:  # of a runtime's own many kinds
        raise decoder.refusal(first_line(error)) from error
    exact = decoder.dtype == torch.float32
    for own, other in zip(wanted, found, strict=True):
        difference, spread = (other - own).float(), own.float().std(-1).clamp(min=1e-30)
        if exact:
            worst = float((difference.abs().amax(-1) / spread).max())
        else:
            worst = float((difference.square().mean(-1).sqrt() / spread).median())
        if not worst <= (TOLERANCE if exact else COARSE_TOLERANCE):
            raise decoder.refusal(
                f"its states differ from those in torch by {worst:.1%} of their spread"
            )


def _outputs(split: SplitDecoder, layers: Sequence[int], axes: int, *, head: bool) -> list[Tensor]:
    """Return states of passes of all kinds, and logits of the last: (..., size) each.

    Args:
        split: The decoder.
        layers: The layers to run.
        axes: How many numbers say where a position is.
        head: Whether logits are made too.
    """
    longest = PROMPTS[0] + REPLY + 1
    tokens = ordinary_tokens(split.model, 2 * longest).view(2, longest).to(split.device)
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
    counted = torch.arange(max(length, axes), device=prompt.device)
    blocks = torch.full_like(prompt, OUTSIDE)
    blocks[BLOCK] = 0
    places = counted[:length].repeat(axes, 1)
    places[1:, BLOCK] = places[1:, BLOCK.start : BLOCK.start + 1] + counted[: axes - 1, None]
    return DecoderInputs(prompt.tolist(), embeddings, places, blocks=blocks)
