"""Which adapter splits which family of models."""

from __future__ import annotations

from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import RotaryDecoder, SplitDecoder

ROTARY = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def split_decoder(model: PreTrainedModel) -> SplitDecoder:
    """Return the split decoder of a causal or vision-language model.

    Raises:
        InputError: The family of the model's decoder is not known.
    """
    decoder = model.get_decoder()
    family = decoder.config.model_type.removesuffix("_text")
    if family not in ROTARY:
        raise InputError(
            f"{type(model).__name__} has a decoder of the family {family!r}, which fastvlm can't"
            f" split; it knows {', '.join(sorted(ROTARY))}. To add one, write a class with the"
            " calls of fastvlm.language.SplitDecoder and name the family in language/families.py."
        )
    return RotaryDecoder(decoder, model.get_output_embeddings())
