"""Loading a model for a command, and the options for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

import typer

from fastvlm.cli.terminal import hush, progress
from fastvlm.functional.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

    from fastvlm.checkpoints import LoadOptions
    from fastvlm.decoding import SamplingParams
    from fastvlm.vlm import VisionLanguageModel


class UsageError(InputError):
    """The command line is wrong, whatever the model and the images."""


@contextmanager
def usage() -> Iterator[None]:
    """Turn any `InputError` raised in this context into a `UsageError`.

    Raises:
        UsageError: An `InputError` was raised.
    """
    try:
        yield
    except InputError as error:
        raise UsageError(str(error)) from error


def checked_device(name: str | None) -> str | None:
    """Return a device's name.

    Raises:
        UsageError: The device doesn't exist.
    """
    if name in (None, "cpu"):
        return name
    import torch

    try:
        device = torch.device(name)
        if device.type == "meta":
            raise UsageError("--device meta computes nothing.")
        torch.zeros(1, device=device)
    # Each backend has its own way of saying that it isn't there.
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise UsageError(
            f"There is no device {name!r} here, which --device names: {first_line(error)}."
        ) from error
    return name


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR",
        help="The model: a directory in transformers' layout, or a name on the Hugging Face hub.",
        show_default="the example model",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=1024,
        help="CPU threads to compute with.",
        show_default="torch's own",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", help="Show results and errors only: no progress, no warnings.", callback=hush
    ),
]
DtypeOption = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"],
    typer.Option(help="The precision to compute in."),
]
QuantizeOption = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(
        help="Hold the decoder's weights in 8 or 4 bits on a CPU; it is another model then.",
        show_default="weights as they are",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where to compute, such as cpu, cuda or cuda:1.",
        callback=checked_device,
    ),
]
SkippedLayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="For layer-skip: the layers that do not draft, separated by commas, from 0 on.",
        show_default="every second one of the middle half; benchmark searches for them",
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        metavar="T", min=0, max=1e6, help="Draw replies at this temperature; 0 for greedy ones."
    ),
]
SampledSeedOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=2**64 - 1,
        help="Sampled replies are functions of it; reply i is drawn with the seed + i.",
        show_default="0",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(metavar="N", min=2, max=2**31 - 1, help="The most tokens of a reply.")
]


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """How long replies are, and how their tokens are chosen."""

    max_new_tokens: MaxNewTokensOption = 160
    temperature: TemperatureOption = 0.0
    seed: SampledSeedOption = None

    def params(self) -> SamplingParams:
        """Return how tokens are chosen.

        Raises:
            UsageError: One is out of range, or needs a temperature.
        """
        from fastvlm.decoding import SamplingParams

        with usage():
            return SamplingParams(
                self.temperature, seed=self.seed, max_new_tokens=self.max_new_tokens
            )


MAX_DIGITS = 9
"""The maximum number of digits in each number of a list, of layers or of sizes in pixels."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Options of all commands on how to compute.

    Args:
        device: The device.
        dtype: The precision.
        threads: CPU threads; None for torch's default.
        quiet: Whether to show results and errors only.
        quantize: The bits of weights; None for the model's own.
    """

    device: DeviceOption = "cpu"
    dtype: DtypeOption = "float32"
    threads: ThreadsOption = None
    quiet: QuietOption = False
    quantize: QuantizeOption = None

    def load(
        self,
        model: str | Path | None,
        draft: Path | None = None,
        *,
        max_slots: int | None = None,
        max_cache_bytes: int | None = None,
        prefix_bytes: int = 0,
    ) -> VisionLanguageModel:
        """Load a model with these settings.

        Args:
            model: A directory, or a name on the Hugging Face hub; None for the example model.
            draft: The draft's directory; None for none.
            max_slots: The maximum number of requests decoded together; None for the default.
            max_cache_bytes: See `load`.
            prefix_bytes: See `load`.

        Raises:
            CheckpointError: The model or the draft is missing, broken or made for something else.
            InputError: The model's family is not supported.
        """
        return load_quietly(
            model,
            draft,
            self.threads,
            self.dtype,
            self.device,
            max_slots=max_slots,
            max_cache_bytes=max_cache_bytes,
            prefix_bytes=prefix_bytes,
            **self.load_options(),
        )

    def load_options(self) -> LoadOptions:
        """Return what `load` is given besides."""
        return {"runtime": "torch", "quantize": self.quantize}

    def prepare(self) -> None:
        """Set the number of threads, and keep `transformers` quiet."""
        prepare_torch(self.threads)

    def progress(
        self, task: str, unit: str | None = None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show the progress of some work; see `terminal.progress`."""
        return progress(task, quiet=self.quiet, unit=unit)


@dataclass(frozen=True, slots=True)
class DecodingRuntime(Runtime):
    """Options of commands that decode on how to compute; see `Runtime`.

    Args:
        runtime: What runs the decoder.
    """

    runtime: Annotated[
        Literal["torch", "onnx", "cuda"] | None,
        typer.Option(
            help="What runs the decoder: the checkpoint's own modules in torch, ONNX Runtime on the"
            " CPU in float32, or CUDA graphs on a GPU; the last two for models of the usual form.",
            show_default="onnx for a small model where it is installed",
        ),
    ] = None

    def load_options(self) -> LoadOptions:
        """Return what `load` is given besides."""
        return {"runtime": self.runtime, "quantize": self.quantize}


def layers_in(listed: str | None) -> tuple[int, ...] | None:
    """Return the layers of a list such as `3,5,7`.

    Raises:
        UsageError: Something in it is not a whole number.
    """
    if listed is None:
        return None
    return whole_numbers(listed, "Layers to skip", "3,5,7")


def whole_numbers(listed: str, what: str, example: str) -> tuple[int, ...]:
    """Parse a list of whole numbers.

    Args:
        listed: Numbers, separated by commas.
        what: What the numbers are, for the error message.
        example: An example of such a list, for the error message.

    Raises:
        UsageError: The list is empty, or something in it is not a whole number.
    """
    numbers = [number.strip() for number in listed.split(",")]
    if not numbers or not all(
        one.isascii() and one.isdigit() and len(one) <= MAX_DIGITS for one in numbers
    ):
        raise UsageError(
            f"{what} are whole numbers separated by commas, as in {example}; got {listed!r}."
        )
    return tuple(map(int, numbers))


def resolve_model(model: str | None) -> str | Path | None:
    """Return where a model is: a path, a name on the hub, or None for the example model.

    `owner/name` may be either. It is a path if it exists, or if the folder `owner` exists: then it
    is a mistyped path, for which the hub is not asked.
    """
    if model is None:
        return None
    path = Path(model)
    return path if path.exists() or path.parent.is_dir() else model


def load_quietly(
    model: str | Path | None,
    draft: Path | None = None,
    threads: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    max_slots: int | None = None,
    max_cache_bytes: int | None = None,
    prefix_bytes: int = 0,
    **options: Unpack[LoadOptions],
) -> VisionLanguageModel:
    """Load a model, and a draft made for it, without progress bars or warnings of other libraries.

    Args:
        model: A directory, or a name on the Hugging Face hub; None for the example model.
        draft: The draft's directory; None for none.
        threads: CPU threads; None for torch's default.
        dtype: The precision to compute in, such as "bfloat16".
        device: The device to compute on.
        max_slots: The maximum number of requests decoded together; None for the default.
        max_cache_bytes: See `load`.
        prefix_bytes: See `load`. The default keeps nothing: most verbs ask once about each image,
            or measure what an image costs.
        options: See `load`.

    Raises:
        CheckpointError: The model or the draft is missing, broken or made for something else.
        InputError: The model's family is not supported.
    """
    if isinstance(model, str):
        model = resolve_model(model)
    if not isinstance(model, str):
        # Files that lie here are read without asking the hub for newer ones.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare_torch(threads)
    import torch

    from fastvlm.decoding.engine import MAX_SLOTS
    from fastvlm.vlm import load

    return load(
        model,
        draft,
        dtype=getattr(torch, dtype),
        device=device,
        prefix_bytes=prefix_bytes,
        max_slots=MAX_SLOTS if max_slots is None else max_slots,
        max_cache_bytes=max_cache_bytes,
        **options,
    )


def prepare_torch(threads: int | None) -> None:
    """Set the number of threads, if one is given, and keep `transformers` quiet."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
