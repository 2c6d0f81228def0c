"""The runtimes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from fastvlm.checkpoints import LoadOptions
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import InputError
from fastvlm.functional.options import refuse_unknown
from fastvlm.language import split_decoder
from fastvlm.language.decoder import SplitDecoder
from fastvlm.language.packed import PACKED_BYTES, pack, pack_decoder
from fastvlm.language.quantised import checked_bits, quantise_decoder
from fastvlm.runtimes.quantised_weights import BITS

RUNTIMES = ("torch", "onnx")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What a model is decoded with.

    Args:
        runtime: `torch`, or `onnx` for ONNX Runtime on the CPU.
        quantize: `int8` or `int4` for weights of 8 or 4 bits; None for the model's own.
        packed_bytes: See `pack_decoder`.

    Raises:
        InputError: There is no such runtime, there are no such weights, or onnxruntime is missing.
    """

    runtime: str = "torch"
    quantize: str | None = None
    packed_bytes: int = PACKED_BYTES

    def __post_init__(self) -> None:
        """Check the options."""
        if self.runtime not in RUNTIMES:
            raise InputError(f"The runtimes are {', '.join(RUNTIMES)}; got {self.runtime!r}.")
        checked_bits(self.quantize)
        if self.runtime == "onnx":
            try:
                import onnx  # noqa: F401 (graphs are built with it)
                import onnxruntime  # noqa: F401
            except ImportError as error:
                raise InputError(
                    f"runtime='onnx' needs {error.name}: pip install 'fastvlm[onnx]'."
                ) from error


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

    Args:
        model: The model, in evaluation mode.
        network: Its draft, if it has one.
        options: The runtime.

    Raises:
        InputError: The decoder is of a form that can't be split, or that the runtime doesn't know.
    """
    if options.runtime == "torch":
        quantise_decoder(model, checked_bits(options.quantize))
        taken = pack_decoder(model, options.packed_bytes)
        pack([] if network is None else [network], options.packed_bytes - taken)
        return split_decoder(model)
    from fastvlm.runtimes.onnx_check import verified
    from fastvlm.runtimes.onnx_decoder import OnnxDecoder

    return verified(OnnxDecoder(split_decoder(model), BITS.get(options.quantize or "")))
