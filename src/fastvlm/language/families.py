"""Which class splits which family of models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.layer_calls import check_arguments
from fastvlm.language.named.bart import (
    BartDecoder,
    BioGptDecoder,
    BlenderbotSmallDecoder,
    M2m100Decoder,
)
from fastvlm.language.named.bloom import BloomDecoder
from fastvlm.language.named.gpt2 import Gpt2Decoder, GptNeoDecoder
from fastvlm.language.named.kosmos import Kosmos25Decoder
from fastvlm.language.named.llama4 import Llama4Decoder
from fastvlm.language.named.mllama import MllamaDecoder
from fastvlm.language.named.opt import OptDecoder
from fastvlm.language.named.placed import TableDecoder
from fastvlm.language.named.t5 import T5Decoder
from fastvlm.language.named.t5gemma import T5GemmaDecoder
from fastvlm.language.named.umt5 import Umt5Decoder
from fastvlm.language.refused import check_name, with_relative
from fastvlm.language.structure import check_structure, text_decoder

NAMED: dict[str, type[SplitDecoder]] = {
    "bart": BartDecoder,
    "blenderbot": BartDecoder,
    "biogpt": BioGptDecoder,
    "blenderbot-small": BlenderbotSmallDecoder,
    "bloom": BloomDecoder,
    "codegen": TableDecoder,
    "gpt2": Gpt2Decoder,
    "gpt_bigcode": Gpt2Decoder,
    "gpt_neo": GptNeoDecoder,
    "gptj": TableDecoder,
    "kosmos_2_5_text_model": Kosmos25Decoder,
    "llama4": Llama4Decoder,
    "m2m_100": M2m100Decoder,
    "marian": BartDecoder,
    "mbart": BartDecoder,
    "mllama_text_model": MllamaDecoder,
    "mt5": T5Decoder,
    "opt": OptDecoder,
    "pegasus": BartDecoder,
    "plbart": BartDecoder,
    "longt5": T5Decoder,
    "umt5": Umt5Decoder,
    "t5": T5Decoder,
    "t5_gemma_module": T5GemmaDecoder,
}
"""Families that are not of the usual form; all others are split by `GeneralDecoder`."""


def family(model_type: str) -> type[SplitDecoder]:
    """Return the class that splits a family, by the `model_type` of its decoder's configuration."""
    return NAMED.get(model_type.removesuffix("_text"), GeneralDecoder)


def check_family(model: PreTrainedModel) -> None:
    """Refuse a model whose decoder can't be split, by what it is made of; weights are not needed.

    Args:
        model: The model, on the meta device.

    Raises:
        InputError: Its decoder lacks parts, keeps a state that can't be rolled back, or gives its
            layers something that isn't known; or it is of a type that no check of it passes. It
            names the nearest family that is decoded.
    """
    try:
        check_name(model)
        check_form(model)
    except InputError as error:
        raise with_relative(model, error) from error


def check_form(model: PreTrainedModel) -> None:
    """Refuse a model by the modules and the configuration of its decoder. See `check_family`."""
    decoder = text_decoder(model)
    kind = family_of(decoder)
    if issubclass(kind, GeneralDecoder):
        check_structure(decoder, kind.PARTS)
        kind.sizes(decoder)
        check_arguments(decoder, kind.EXTRAS)


def family_of(decoder: Any) -> type[SplitDecoder]:
    """Return the class that splits a decoder."""
    return family(getattr(getattr(decoder, "config", None), "model_type", ""))


def split_decoder(model: PreTrainedModel) -> SplitDecoder:
    """Return the split decoder of a causal, an encoder-decoder or a vision-language model.

    Raises:
        InputError: The decoder is of a form that can't be split, or gave other logits than the
            model itself.
    """
    decoder = text_decoder(model)
    return family_of(decoder)(model, decoder)
