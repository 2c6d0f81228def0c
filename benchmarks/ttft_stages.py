"""Time to first token, stage by stage, and the arithmetic behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.data.journal import append_line, whole_lines
from fastvlm.evaluation.measuring import no_progress
from fastvlm.functional.errors import InputError
from fastvlm.functional.statistics import Spread
from ttft_models import TEXT_AFTER, TEXT_BEFORE, Contender, Contenders

STAGES = ("vision", "projector", "prefill", "first_token")
"""Encoder; projector and packing; all decoder layers over the prompt; norm, head and choice."""


@contextmanager
def readings(contender: Contender, read: Callable[[], float]) -> Iterator[list[float]]:
    """Collect a meter's readings at the end of the encoder and of the decoder's last layer."""
    taken: list[float] = []

    def take(_: nn.Module, __: object, ___: object) -> None:
        taken.append(read())

    hooks = [
        module.register_forward_hook(take) for module in (contender.vision, contender.last_layer)
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def run_stages(contender: Contender, pixels: Tensor, read: Callable[[], float]) -> list[float]:
    """Run a contender to its first token; return what a meter gains in each of `STAGES`."""
    embed = contender.decoder.get_input_embeddings()
    tokens = torch.zeros(1, TEXT_BEFORE + TEXT_AFTER, dtype=torch.long, device=pixels.device)
    with readings(contender, read) as inner:
        started = read()
        features = contender.features(pixels)
        seen = read()
        text = embed(tokens)
        x = torch.cat((text[:, :TEXT_BEFORE], features[None], text[:, TEXT_BEFORE:]), 1)
        best = contender.logits(x)[0, -1].argmax()
        if pixels.device.type != "meta":
            int(best)
        ended = read()
    encoded, prefilled = inner
    return [encoded - started, seen - encoded, prefilled - seen, ended - prefilled]


def time_stages(contender: Contender, pixels: Tensor) -> list[float]:
    """Return the milliseconds of each of `STAGES`."""
    device = pixels.device

    def seconds() -> float:
        if device.type != "cpu":
            # What was given to an accelerator has been computed.
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return [1e3 * taken for taken in run_stages(contender, pixels, seconds)]


def count_stages(contender: Contender) -> list[float]:
    """Return the arithmetic of each of `STAGES` in GFLOP, a multiplication and an addition as two.

    Args:
        contender: One that was built on the device `meta`.
    """
    pixels = torch.empty(contender.pixels, device="meta", dtype=contender.decoder.dtype)
    with FlopCounterMode(display=False) as counter:
        counted = run_stages(contender, pixels, lambda: float(counter.get_total_flops()))
    return [flop / 1e9 for flop in counted]


def parameters(module: nn.Module) -> int:
    """Return how many parameters a module has, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def describe(contender: Contender) -> dict[str, Any]:
    """Return what is known of a contender without running it on data."""
    return {
        "name": contender.name,
        "software": contender.software,
        "side": contender.side,
        "pixels": list(contender.pixels),
        "visual_tokens": contender.visual_tokens,
        "parameters": {
            "vision": parameters(contender.vision),
            "projector": parameters(contender.projector),
            "decoder": parameters(contender.decoder),
        },
        "gflop": dict(zip(STAGES, count_stages(contender), strict=True)),
    }


def chosen(names: Sequence[str] | None) -> list[str]:
    """Return the contenders whose names contain one of the given ones; all, if none is given.

    Raises:
        InputError: A name fits none of them.
    """
    known = [name for name, _ in Contenders("meta").all()]
    if not names:
        return known
    for name in names:
        if not any(name.lower() in one.lower() for one in known):
            raise InputError(f"The contenders are {', '.join(known)}; got {name!r}.")
    return [one for one in known if any(name.lower() in one.lower() for name in names)]


def measure_ttft(
    names: Sequence[str],
    output: Path,
    *,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int, int], None] = no_progress,
) -> list[dict[str, Any]]:
    """Time contenders in turns, so that what slows the machine slows all of them.

    Every measurement is added to `output/rounds.jsonl` at once; a run that was stopped goes on
    from there.

    Args:
        names: Which of `Contenders.all`.
        output: The folder of the measurements.
        rounds: Measurements of each. One before them, of each model, is not counted.
        dtype: The precision.
        device: Where to compute.
        progress: Told how many measurements are done, of how many.

    Returns:
        A record for each contender: what `describe` gives, `ms` (by stage) and `ttft_ms`, each a
        median with its quartiles.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "rounds.jsonl"
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    taken = _read(file, settings)
    with torch.device("meta"):
        shells = dict(Contenders("meta", dtype).all())
        records = {name: describe(shells[name]()) for name in names}
    contenders = dict(Contenders(device, dtype).all())
    built: dict[str, Contender] = {}
    done, total = 0, rounds * len(names)
    for turn in range(rounds):
        for name in names:
            if turn >= len(taken.get(name, [])):
                if name not in built:
                    built[name] = contenders[name]()
                    # Kernels are chosen, and memory is asked for, in the first run.
                    time_stages(built[name], _noise(built[name], dtype, device))
                times = time_stages(built[name], _noise(built[name], dtype, device))
                taken.setdefault(name, []).append(times)
                append_line(file, {"name": name, **settings, "ms": times})
            done += 1
            progress(done, total)
    return [{**records[name], **_summary(taken[name][:rounds])} for name in names]


def _noise(contender: Contender, dtype: torch.dtype, device: str) -> Tensor:
    return torch.rand(contender.pixels, dtype=dtype, device=device)


def _read(file: Path, settings: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Return what was measured before, by name."""
    taken: dict[str, list[list[float]]] = {}
    for entry in whole_lines(file):
        if any(entry.get(name) != value for name, value in settings.items()):
            raise InputError(
                f"{file} was measured with {entry['threads']} threads in {entry['dtype']} on"
                f" {entry.get('device')}; choose another --output."
            )
        taken.setdefault(entry["name"], []).append(entry["ms"])
    return taken


def _summary(taken: Sequence[Sequence[float]]) -> dict[str, Any]:
    stages = {
        stage: Spread.of([times[index] for times in taken]) for index, stage in enumerate(STAGES)
    }
    whole = Spread.of([sum(times) for times in taken])
    return {
        "rounds": len(taken),
        "ms": {stage: [s.median, s.low, s.high] for stage, s in stages.items()},
        "ttft_ms": [whole.median, whole.low, whole.high],
    }
