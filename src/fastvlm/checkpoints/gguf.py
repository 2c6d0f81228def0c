"""GGUF files of llama.cpp's, read by `transformers` and saved in its own layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastvlm.checkpoints.loading import attempt
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.functional.files import written_directory
from fastvlm.language.families import check_family

GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class ConvertedGguf:
    """What became of a GGUF file.

    Args:
        parameters: The model's parameters.
        quantisation: The types in which the file has its matrices, the most frequent first.
    """

    parameters: int
    quantisation: tuple[str, ...]


def convert_gguf(file: Path, output: Path, dtype: torch.dtype) -> ConvertedGguf:
    """Save the text model of a GGUF file and its tokenizer as `transformers` does.

    Its weights are those that `transformers` computes with when it reads the file: what was
    quantised stays rounded as it is.

    Args:
        file: The file.
        output: The directory; it must not exist.
        dtype: The precision to store.

    Raises:
        CheckpointError: The file is broken, or `transformers` doesn't know such a model.
        InputError: The output exists, the family is not supported, or the gguf package is missing.
        StorageError: The disk is full, or the directory can't be written.
    """
    if output.exists():
        raise InputError(f"{output} exists already; choose another output.")
    quantisation = quantisation_of(file)
    given = {"gguf_file": file.name, "dtype": dtype}
    model: PreTrainedModel = attempt(
        f"The model in {file} can't be loaded",
        AutoModelForCausalLM.from_pretrained,
        file.parent,
        **given,
    )
    tokenizer = attempt(
        f"The tokenizer in {file} can't be loaded",
        AutoTokenizer.from_pretrained,
        file.parent,
        gguf_file=file.name,
    )
    check_family(model)
    # Its weights are whole by now, but transformers refuses to save what has a quantiser.
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    model.config.name_or_path = ""
    with written_directory(output) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return ConvertedGguf(sum(p.numel() for p in model.parameters()), quantisation)


def quantisation_of(file: Path) -> tuple[str, ...]:
    """Return the types in which a GGUF file has its matrices, the most frequent first.

    Raises:
        CheckpointError: The file is broken.
        InputError: The gguf package is missing.
    """
    try:
        gguf: Any = import_module("gguf")
    except ImportError as error:
        raise InputError("A GGUF file needs gguf: pip install 'fastvlm[gguf]'.") from error
    reader = attempt(f"{file} can't be read", gguf.GGUFReader, file)
    counts = Counter(t.tensor_type.name for t in reader.tensors if len(t.shape) > 1)
    if not counts:
        raise CheckpointError(f"There are no weights in {file}.")
    return tuple(name for name, _ in counts.most_common())
