"""Teachers of an encoder: any torch module or ONNX file that maps images to features."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvlm.functional.digests import digest, digest_of_weights
from fastvlm.functional.errors import InputError, first_line, shortened
from fastvlm.vision.images import MAX_SIDE_PIXELS

CHANNELS = 3
IMAGE_DIMENSIONS, LOGITS_DIMENSIONS = 4, 2
STATED = ("image_size", "image_mean", "image_std")
"""What a teacher says of its images: attributes of a module, metadata of an ONNX file."""


@dataclass(frozen=True, slots=True)
class TeacherImages:
    """How a teacher takes its images: square, and as (pixels - mean) / std of pixels in [0, 1].

    Args:
        size: Their side in pixels; None where the teacher says it.
        mean: The mean of each colour; None where the teacher says it.
        std: The standard deviation of each colour; None where the teacher says it.
    """

    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What a teacher says of some images.

    Args:
        grid: The features of each place: (batch, channels, rows, columns); None where it has only
            those of whole images.
        pooled: The features of whole images: (batch, channels).
        logits: Of the classes that it tells apart: (batch, classes); None if it tells none.
    """

    grid: Tensor | None
    pooled: Tensor
    logits: Tensor | None


class Network(Protocol):
    """What a teacher is made of."""

    stated: Mapping[str, Any]
    """What it says of its images itself, by the names of `STATED`."""
    identity: str
    """A digest that tells it from others."""

    def __call__(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return `features`, and maybe `logits`, of normalised images."""
        ...


class Teacher:
    """A frozen network whose features of images an encoder learns.

    Args:
        name: What the user called it.
        network: The network.
        given: What is said of its images; it comes before what the network says itself.

    Raises:
        InputError: The size or the normalisation of its images is not known, or what it makes of
            two images is not understood.
    """

    def __init__(self, name: str, network: Network, given: TeacherImages) -> None:
        self.name, self.network = name, network
        size = self._stated("image_size", given.size)
        mean, std = self._stated("image_mean", given.mean), self._stated("image_std", given.std)
        self.size = _whole(name, size)
        self.mean = three_numbers(f"The mean of {name}'s images", mean)
        self.std = three_numbers(f"The std of {name}'s images", std)
        if not all(one > 0 for one in self.std):
            raise InputError(f"The std of {name}'s images is above 0; got {list(self.std)}.")
        outputs = self(torch.full((2, CHANNELS, self.size, self.size), 0.5))
        self.classes = None if outputs.logits is None else outputs.logits.shape[1]
        self.channels = outputs.pooled.shape[1]
        self.has_grid = outputs.grid is not None

    @property
    def plan(self) -> dict[str, Any]:
        """All that decides what it teaches, in plain types."""
        return {
            "identity": self.network.identity,
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> TeacherOutputs:
        """Return what it says of images.

        Args:
            pixels: (batch, 3, size, size) in [0, 1].

        Raises:
            InputError: It can't compute them, or its features have another form.
        """
        mean, std = (pixels.new_tensor(one)[:, None, None] for one in (self.mean, self.std))
        shape = tuple(pixels.shape)
        try:
            found = self.network((pixels - mean) / std)
        # Whatever the user's module and its libraries raise.
        except Exception as error:
            raise InputError(
                f"The teacher {self.name} can't take images of {shape}: {first_line(error)}."
            ) from error
        if "features" not in found:
            raise InputError(
                f"The teacher {self.name} returns {', '.join(map(str, found)) or 'nothing'};"
                " features are needed, alone or by this name."
            )
        features, logits = found["features"], found.get("logits")
        for what, one in (("features", features), ("logits", logits)):
            if one is not None and (not isinstance(one, Tensor) or len(one) != len(pixels)):
                said = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise InputError(f"The {what} of {self.name} for {shape} are {said}.")
        if not bool(features.isfinite().all()):
            raise InputError(f"The teacher {self.name} has features that are no finite numbers.")
        if logits is not None and logits.dim() != LOGITS_DIMENSIONS:
            raise InputError(
                f"The logits of {self.name} are {tuple(logits.shape)}; (batch, classes) is needed."
            )
        grid, pooled = self._laid_out(
            features.to(torch.promote_types(features.dtype, pixels.dtype))
        )
        return TeacherOutputs(grid, pooled, None if logits is None else logits.to(pooled.dtype))

    def _laid_out(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return features as a grid, if there is one, and those of whole images."""
        match features.dim():
            case 2:
                return None, features
            case 3:
                batch, tokens, channels = features.shape
                side = math.isqrt(tokens)
                # A vision transformer's class token stands first, and is its own summary.
                extra = tokens - side * side
                if extra <= 1 and side:
                    grid = features[:, extra:].transpose(1, 2).reshape(batch, channels, side, side)
                    return grid, features[:, 0] if extra else features.mean(1)
            case 4:
                return features, features.mean((2, 3))
        raise InputError(
            f"The features of {self.name} are {tuple(features.shape)}; a teacher has a grid (batch,"
            " channels, rows, columns), tokens (batch, tokens, channels) of a square, with or"
            " without a class token before them, or a vector (batch, channels)."
        )

    def _stated(self, name: str, given: Any) -> Any:
        """Return what is said of its images, by the user or by the network."""
        value = self.network.stated.get(name) if given is None else given
        if value is None:
            option = name.removeprefix("image_")
            raise InputError(
                f"The teacher {self.name} doesn't say the {option} of its images ({name}): give"
                f" --teacher-{option}."
            )
        return value


class TorchNetwork:
    """A torch module as a teacher's network.

    Args:
        module: It takes (batch, 3, height, width) and returns features, or a mapping with
            `features` and maybe `logits`.
        device: Where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module.requires_grad_(False).to(device), device
        self.stated: Mapping[str, Any] = {name: getattr(module, name, None) for name in STATED}
        self.identity = digest_of_weights(module)

    def __call__(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the features, see `Network`."""
        found = self.module(pixels.to(self.device))
        return found if isinstance(found, Mapping) else {"features": found}


class OnnxNetwork:
    """An ONNX file as a teacher's network, run by ONNX Runtime on the CPU.

    Args:
        file: The file.

    Raises:
        InputError: ONNX Runtime is not installed, or the file can't be read or has another input
            than images.
    """

    def __init__(self, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                "A teacher in ONNX needs onnxruntime: pip install 'fastvlm[onnx]'."
            ) from error
        if not file.is_file():
            raise InputError(f"There is no teacher at {file}.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
        # Its own exceptions have no common base.
        except Exception as error:
            raise InputError(f"{file} can't be read as ONNX: {first_line(error)}.") from error
        inputs = self.session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if (
            len(shape) != IMAGE_DIMENSIONS
            or shape[1] not in (CHANNELS, "3")
            or inputs[0].type != "tensor(float)"
        ):
            told = "; ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
            raise InputError(
                f"{file} takes {told}; a teacher takes one input of float32 (batch, 3, height,"
                " width)."
            )
        self.input: str = inputs[0].name
        self.batch = shape[0] if isinstance(shape[0], int) else None
        if self.batch not in (None, 1):
            raise InputError(
                f"{file} takes {self.batch} images at a time; export it with a free batch, or of 1."
            )
        self.outputs = [one.name for one in self.session.get_outputs()]
        stated: dict[str, Any] = dict(self.session.get_modelmeta().custom_metadata_map)
        if isinstance(shape[2], int):
            stated["image_size"] = shape[2]
        self.stated: Mapping[str, Any] = stated
        self.identity = digest(file)

    def __call__(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the features, see `Network`."""
        # A file that was exported for one image gets one at a time.
        parts = pixels.float().cpu().split(self.batch or len(pixels))
        ran = [self.session.run(None, {self.input: part.contiguous().numpy()}) for part in parts]
        made = [
            torch.cat([torch.from_numpy(one) for one in outputs])
            for outputs in zip(*ran, strict=True)
        ]
        names = ["features"] if len(made) == 1 else self.outputs
        return {name: one.to(pixels.device) for name, one in zip(names, made, strict=True)}


def load_teacher(name: str, given: TeacherImages, device: torch.device) -> Teacher:
    """Return a teacher.

    Args:
        name: An ONNX file (`.onnx`), a program that `torch.export` saved (`.pt2`), or
            `module:callable` or `file.py:callable` for a class or function that returns a module.
        given: What is said of its images.
        device: Where a torch module computes.

    Raises:
        InputError: There is none, it can't be made, or it is no teacher.
    """
    if name.endswith(".onnx"):
        return Teacher(name, OnnxNetwork(Path(name)), given)
    if name.endswith(".pt2"):
        return Teacher(name, TorchNetwork(_exported(Path(name)), device), given)
    return Teacher(name, TorchNetwork(_made(name), device), given)


def _exported(file: Path) -> nn.Module:
    """Return the module of a program that `torch.export` saved."""
    if not file.is_file():
        raise InputError(f"There is no teacher at {file}.")
    try:
        return torch.export.load(file).module()
    # Of zipfile, of pickle and of torch.
    except Exception as error:
        raise InputError(
            f"{file} can't be read as an exported program: {first_line(error)}."
        ) from error


def _made(name: str) -> nn.Module:
    """Return the module that a named callable makes, in evaluation mode."""
    place, separator, attribute = name.rpartition(":")
    if not separator or not place or not attribute.isidentifier():
        raise InputError(
            "A teacher is file.onnx, file.pt2, module:callable or file.py:callable; got"
            f" {shortened(repr(name))}."
        )
    try:
        make = getattr(_imported(place), attribute)
        module = make()
    except InputError:
        raise
    # Whatever the user's code raises.
    except Exception as error:
        raise InputError(
            f"The teacher {name} can't be made: {type(error).__name__}: {first_line(error)}."
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"The teacher {name} is a {type(module).__name__}, no torch module.")
    return module.eval()


def _imported(place: str) -> ModuleType:
    """Import a module by its dotted name, or from a file."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place)
    if not file.is_file():
        raise InputError(f"There is no file {place} with a teacher in it.")
    spec = importlib.util.spec_from_file_location(f"fastvlm_teacher_{file.stem}", file)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where classes, dataclasses among them, look for their own module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _whole(name: str, size: Any) -> int:
    """Return a side in pixels."""
    if not str(size).isdecimal() or not 1 <= int(size) <= MAX_SIDE_PIXELS:
        raise InputError(f"The size of {name}'s images is a number of pixels; got {size!r}.")
    return int(size)


def three_numbers(what: str, given: Any) -> tuple[float, ...]:
    """Return a number for each colour.

    Args:
        what: What they are, for the error message.
        given: Numbers, or a text of numbers with commas or blanks between them.

    Raises:
        InputError: They are not three.
    """
    parts = given.replace(",", " ").split() if isinstance(given, str) else given
    try:
        numbers = tuple(float(one) for one in parts)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != CHANNELS or not all(map(math.isfinite, numbers)):
        raise InputError(f"{what} is three numbers, for red, green and blue; got {given!r}.")
    return numbers
