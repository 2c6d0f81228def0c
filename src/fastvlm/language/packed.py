"""A decoder whose weights are laid out once for the CPU. See `fastvlm.functional.packed`."""

from __future__ import annotations

from transformers import PreTrainedModel

from fastvlm.functional.packed import pack
from fastvlm.language.structure import text_decoder

PACKED_BYTES = 4 * 2**30
"""Memory for packed weights: those of a decoder with two billion parameters in 16 bits."""


def pack_decoder(model: PreTrainedModel, most_bytes: int = PACKED_BYTES) -> int:
    """Pack a model's decoder and LM head, as far as that pays on this machine and fits into memory.

    On an x86 CPU every pass over one to a few tens of positions is then faster, and so is every way
    of decoding; elsewhere nothing is done. Parameters, state and gradients stay as they are, and
    products differ by rounding from those of plain weights.

    A layer whose weights change afterwards is an ordinary one again from its next call on, however
    they were changed: written to, replaced, or edited through `weight.data`, as PEFT merges
    adapters. What can't be noticed is an edit through `weight.data` that leaves most of a matrix as
    it was, such as of single weights or rows: write to the weight itself, under `torch.no_grad()`.

    Args:
        model: A causal, an encoder-decoder or a vision-language model of a family that is known.
        most_bytes: The most memory for packed weights, which are a second copy.

    Returns:
        The bytes that they take.
    """
    return pack([text_decoder(model), model.get_output_embeddings()], most_bytes)
