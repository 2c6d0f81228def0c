"""The runtimes by name."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from fastvlm.checkpoints import LoadOptions
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.options import refuse_unknown
from fastvlm.functional.packed import pack
from fastvlm.language import split_decoder
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.draft_path import DraftsAhead
from fastvlm.language.general import GeneralDecoder
from fastvlm.language.packed import PACKED_BYTES, pack_decoder
from fastvlm.language.quantised import checked_bits, quantise_decoder
from fastvlm.language.structure import text_decoder
from fastvlm.runtimes.lazy_draft_runner import LazyDraftRunner
from fastvlm.runtimes.quantised_weights import BITS
from fastvlm.runtimes.runtime_check import check
from fastvlm.vision import FastViTHD

RUNTIMES = ("torch", "onnx", "cuda")
FLOAT32_BYTES = 4
PACKAGES = ("onnx", "onnxruntime")
SMALL = 150_000_000
"""Weights of the largest decoder that ONNX Runtime computes by default in float32. A step of a
small model is mostly calls, of which it makes a third; of a larger one it is mostly the reading of
weights, of which torch reads half of the bytes where a checkpoint has 16 bits."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What a model is decoded with.

    Args:
        runtime: `torch`; `onnx` for ONNX Runtime on the CPU; `cuda` for CUDA graphs of our own
            kernels on a GPU. None for ONNX Runtime where it is installed and is the faster one: for
            a model in float32, of a form that it knows, that is small (`SMALL`) or whose weights
            are to have fewer bits, and fits into `packed_bytes`; torch for any other. Beside torch,
            ONNX Runtime computes the drafts of a model on a CPU, where it knows its form.
        quantize: `int8` or `int4` for weights of 8 or 4 bits; None for the model's own.
        packed_bytes: See `pack_decoder`.

    Raises:
        InputError: There is no such runtime, it has no such weights, or a package is missing.
    """

    runtime: str | None = None
    quantize: str | None = None
    packed_bytes: int = PACKED_BYTES

    def __post_init__(self) -> None:
        """Check the options."""
        if self.runtime not in (*RUNTIMES, None):
            raise InputError(f"The runtimes are {', '.join(RUNTIMES)}; got {self.runtime!r}.")
        checked_bits(self.quantize)
        if self.runtime == "onnx" and (missing := _missing()):
            raise InputError(f"runtime='onnx' needs {missing}: pip install 'fastvlm[onnx]'.")
        if self.runtime == "cuda" and self.quantize is not None:
            raise InputError("runtime='cuda' reads a model's own weights; leave out quantize.")
        if self.runtime == "cuda" and find_spec("triton") is None:
            raise InputError("runtime='cuda' needs triton, which comes with torch for CUDA.")


def _missing() -> str | None:
    """Return a package that ONNX Runtime needs and that is not installed."""
    return next((name for name in PACKAGES if find_spec(name) is None), None)


def split_load_options(given: LoadOptions) -> tuple[RuntimeOptions, Any]:
    """Return the options of a runtime, and those for `transformers`.

    Raises:
        InputError: An option is unknown, or a runtime's is out of range.
    """
    refuse_unknown(given, tuple(LoadOptions.__annotations__), "load takes")
    rest: Any = dict(given)
    own = {name: rest.pop(name) for name in RuntimeOptions.__slots__ if name in rest}
    return RuntimeOptions(**own), rest


def decoder_of(
    model: PreTrainedModel, network: ImitationNetwork | None, options: RuntimeOptions
) -> SplitDecoder:
    """Return a model's decoder in a runtime, with weights packed as that runtime has them.

    On a CPU the encoder's are packed too, where it is a FastViTHD and they fit beside those.

    Args:
        model: The model, in evaluation mode.
        network: Its draft, if it has one.
        options: The runtime.

    Raises:
        InputError: The decoder is of a form that can't be split, or that the runtime doesn't know.
    """
    decoder: SplitDecoder | None = None
    if options.runtime == "onnx":
        decoder = onnx_decoder(model, options)
    elif options.runtime is None and not _missing() and _suits_onnx(model, options):
        with suppress(InputError, ImportError):
            # Of another form than it knows, or it can't be used here: torch computes any.
            decoder = onnx_decoder(model, options)
    left = options.packed_bytes
    if decoder is not None:
        left -= _float32_bytes(model)
    else:
        quantise_decoder(model, checked_bits(options.quantize))
        left -= pack_decoder(model, left)
        left -= pack([] if network is None else [network], left)
        decoder = cuda_decoder(model) if options.runtime == "cuda" else split_decoder(model)
        decoder.ahead = draft_runner_of(decoder)
    for part in model.modules():
        if isinstance(part, FastViTHD):
            left -= part.pack(left)
    return decoder


def cuda_decoder(model: PreTrainedModel) -> SplitDecoder:
    """Return a model's decoder in CUDA graphs.

    Raises:
        InputError: The model is not on a GPU, or its decoder is of a form that they don't know.
    """
    from fastvlm.runtimes.cuda_decoder import CudaDecoder

    decoder = CudaDecoder(split_decoder(model))
    check(decoder, range(decoder.depth))
    return decoder


def onnx_decoder(model: PreTrainedModel, options: RuntimeOptions) -> SplitDecoder:
    """Return a model's decoder in ONNX Runtime.

    Raises:
        InputError: The decoder is of a form that it doesn't know.
    """
    from fastvlm.runtimes.onnx_decoder import OnnxDecoder

    bits = BITS.get(options.quantize or "")
    required = options.runtime == "onnx" or bits is not None
    decoder = OnnxDecoder(split_decoder(model), bits, required=required)
    if bits is None:
        check(decoder, range(decoder.depth))
    else:
        _check_kinds(decoder.split)
    return decoder


def _check_kinds(split: SplitDecoder) -> None:
    """Refuse a decoder whose layers are computed otherwise in ONNX Runtime.

    Raises:
        InputError: They are, or it doesn't know their form.
    """
    from fastvlm.runtimes.onnx_decoder import OnnxDecoder

    # By layers in float32, one of each kind: rounding is all that tells other weights apart. A head
    # is a norm, which is checked where it is read, and a product.
    exact = OnnxDecoder(split, required=False)
    check(exact, exact.forms.kinds(), head=False)


def draft_runner_of(split: SplitDecoder) -> DraftsAhead | None:
    """Return what runs several draft steps of a decoder in torch in one call, by ONNX Runtime.

    None where that is not installed, or the decoder is not of the usual form.
    """
    usual = isinstance(split, GeneralDecoder) and not split.EXTRAS
    return None if _missing() or not usual else LazyDraftRunner(split, _draft_runner)


def _draft_runner(split: SplitDecoder) -> DraftsAhead:
    from fastvlm.runtimes.decoder_forms import DecoderForms
    from fastvlm.runtimes.draft_runner import DraftRunner, drafts_for

    assert isinstance(split, GeneralDecoder)  # `draft_runner_of` has looked
    if not drafts_for(split):
        raise InputError("Drafts of several steps are for models on a CPU, in 32 or 16 bits.")
    _check_kinds(split)
    return DraftRunner(DecoderForms(split))


def _suits_onnx(model: PreTrainedModel, options: RuntimeOptions) -> bool:
    """Return whether ONNX Runtime is faster than torch, and may hold a decoder's weights too."""
    size = _float32_bytes(model)
    faster = size <= FLOAT32_BYTES * SMALL or options.quantize is not None
    fits = size <= options.packed_bytes
    return faster and fits and model.dtype == torch.float32


def _float32_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a decoder's weights in float32."""
    return FLOAT32_BYTES * sum(weight.numel() for weight in text_decoder(model).parameters())
