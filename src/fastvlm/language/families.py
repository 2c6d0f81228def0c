"""Which adapter splits which family of models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.opt import OptDecoder
from fastvlm.language.rotary import RotaryDecoder
from fastvlm.language.t5 import T5Decoder

FAMILIES: dict[str, type[SplitDecoder]] = {
    "llama": RotaryDecoder,
    "mistral": RotaryDecoder,
    "opt": OptDecoder,
    "qwen2": RotaryDecoder,
    "qwen2_5_vl": RotaryDecoder,
    "qwen2_vl": RotaryDecoder,
    "qwen3": RotaryDecoder,
    "t5": T5Decoder,
}


def family(model_type: str) -> type[SplitDecoder]:
    """Return the adapter of a family, by the `model_type` of its decoder's configuration.

    Raises:
        InputError: The family is not known.
    """
    name = model_type.removesuffix("_text")
    if name not in FAMILIES:
        raise InputError(
            f"The decoder is of the family {name!r}, which fastvlm can't split; it knows"
            f" {', '.join(FAMILIES)}. To add one, write a class with the calls of"
            " fastvlm.language.SplitDecoder and name the family in language/families.py."
        )
    return FAMILIES[name]


def text_decoder(model: PreTrainedModel) -> Any:
    """Return the decoder inside a causal, an encoder-decoder or a vision-language model.

    It is the module that has the layers: `get_decoder` of some models returns another whole model.
    """
    decoder = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    return decoder


def split_decoder(model: PreTrainedModel) -> SplitDecoder:
    """Return the split decoder of a causal, an encoder-decoder or a vision-language model.

    Raises:
        InputError: The family of the model's decoder is not known.
    """
    decoder = text_decoder(model)
    return family(decoder.config.model_type)(model, decoder)
