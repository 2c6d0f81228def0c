"""Captions of many images and fleets of replicas, as Markdown: measured, simulated, predicted."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REPLY, PROMPT, BATCH = 64, 30, 64
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.6
"""Shares of a datasheet's arithmetic and bandwidth that passes reach: assumptions."""
ENCODER_OPERATIONS = 486.7e9
VISUAL_TOKENS = 256


@dataclass(frozen=True)
class Accelerator:
    """A datasheet: bfloat16 without sparsity, memory, and a price an hour that is assumed."""

    name: str
    operations_per_second: float
    bytes_per_second: float
    price: float


@dataclass(frozen=True)
class Decoder:
    """A model around FastViTHD: what a token passes, and what it leaves in the cache."""

    name: str
    parameters: float
    bytes_per_position: int


ACCELERATORS = (
    Accelerator("L4", 121e12, 300e9, 0.8),
    Accelerator("A100 80 GB SXM", 312e12, 2039e9, 2.0),
    Accelerator("H100 SXM", 989e12, 3350e9, 3.0),
    Accelerator("H200 SXM", 989e12, 4800e9, 4.0),
)
DECODERS = (
    Decoder("FastVLM-0.5B", 0.49e9, 12_288),
    Decoder("FastVLM-1.5B", 1.54e9, 28_672),
    Decoder("FastVLM-7B", 7.07e9, 57_344),
)


def seconds_per_image(model: Decoder, machine: Accelerator) -> tuple[float, float, float]:
    """Return what the encoder, the prefill and the decoding of an image take at least."""
    arithmetic = machine.operations_per_second * COMPUTE_SHARE
    bandwidth = machine.bytes_per_second * BANDWIDTH_SHARE
    context = VISUAL_TOKENS + PROMPT + REPLY // 2
    read = 2 * model.parameters + BATCH * context * model.bytes_per_position
    step = max(read / bandwidth, 2 * model.parameters * BATCH / arithmetic)
    return (
        ENCODER_OPERATIONS / arithmetic,
        2 * model.parameters * (VISUAL_TOKENS + PROMPT) / arithmetic,
        REPLY * step / BATCH,
    )


def prediction() -> str:
    """Return images an hour and the price of a million, by datasheets."""
    lines = [
        (
            "| accelerator | model | encoder, prefill, decoding: ms an image | images an hour"
            " | hours for a million | price of a million |"
        ),
        f"|---|---|{'---:|' * 4}",
    ]
    for machine in ACCELERATORS:
        for model in DECODERS:
            parts = seconds_per_image(model, machine)
            hour = 3600 / sum(parts)
            told = ", ".join(f"{1e3 * part:.2f}" for part in parts)
            lines.append(
                f"| {machine.name} | {model.name} | {told} | {hour:,.0f} | {1e6 / hour:.1f}"
                f" | ${1e6 / hour * machine.price:,.1f} |"
            )
    prices = ", ".join(f"${one.price:g} ({one.name})" for one in ACCELERATORS)
    lines += [
        "",
        (
            f"By arithmetic: {COMPUTE_SHARE:.0%} of the datasheets' bfloat16 operations and"
            f" {BANDWIDTH_SHARE:.0%} of their bandwidth, {REPLY} tokens of caption in batches of"
            f" {BATCH}, image files decoded beside it. The prices an hour are assumed: {prices}."
        ),
    ]
    return "\n".join(lines)


def fleets() -> str:
    """Return what the simulation says of fleets."""
    found = json.loads((RESULTS / "scale.json").read_text())
    lines = [
        (
            "| replicas | requests/s | p50, p99 in s | cache met: by image | at random"
            " | a tenth lost: p99 in s, before | after | asked again | twice the load: p99 in s"
            " until it has settled | after |"
        ),
        f"|---:|{'---:|' * 9}",
    ]
    for fleet in found["fleets"]:
        by_image, at_random = fleet["by image"], fleet["at random"]
        cells = ["-"] * 5
        if "loss of a tenth" in fleet:
            loss, more = fleet["loss of a tenth"], fleet["twice the load"]
            cells = [
                f"{loss['before']['p99']:.2f}",
                f"{loss['after']['p99']:.2f}",
                f"{loss['asked_again']:,} of {loss['requests']:,}",
                f"{more['during']['p99']:.1f}",
                f"{more['after']['p99']:.2f}",
            ]
        lines.append(
            f"| {fleet['replicas']:,} | {fleet['requests_per_second']:,.0f} |"
            f" {by_image['p50']:.2f}, {by_image['p99']:.2f} | {by_image['cache_hits']:.1%} |"
            f" {at_random['cache_hits']:.1%} | {' | '.join(cells)} |"
        )
    lost = sum(fleet.get("loss of a tenth", {}).get("lost", 0) for fleet in found["fleets"])
    lines += [
        "",
        (
            "Simulated by `benchmarks/scale_simulation.py`, not measured: a replica does"
            f" {found['requests_per_second_of_a_replica']:.1f} requests a second in"
            f" {found['slots']} slots, and {found['work_with_kept_image']:.0%} of the work where"
            " it has the image. The cache is met in this share of the requests about an image that"
            " was asked about before. `At random` is the better of two replicas. After the loss,"
            f" {lost or 'no'} request is missing. The load doubles at once, from half of the"
            " replicas on, which Ray Serve answers after half a minute of waiting."
        ),
    ]
    return "\n".join(lines)


def captions() -> str:
    """Return what captioning costs, as measured."""
    found = json.loads((RESULTS / "captioning.json").read_text())
    contenders: dict[str, Any] = found["contenders"]
    plain = contenders["plain"]
    lines = [
        "| | images/s | time over the plain loop's | of the processor | captions that differ |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in contenders.items():
        ratios = " | ".join(
            f"{statistics.median(a / b for a, b in zip(one[kind], plain[kind], strict=True)):.2f}x"
            for kind in ("seconds", "processor_seconds")
        )
        rate = found["images"] / statistics.median(one["seconds"])
        lines.append(f"| {name} | {rate:.1f} | {ratios} | {one['different']} |")
    machine = found["hardware"]
    decoded = " and ".join(
        f"{rate:.0f} photos of {size} a second"
        for size, rate in found["photos_decoded_per_second"].items()
    )
    lines += [
        "",
        (
            f"The example model, {found['images']:,} photos, captions of up to"
            f" {found['max_new_tokens']} tokens, in turns, without loading the model and starting"
            " Ray; the time on the clock, and that of the processor, all processes of Ray among"
            " them. `transformers` generates in batches of 16."
            f" float32, {machine['threads']} thread of {machine['processor']}. A core decodes"
            f" {decoded} (JPEG)."
        ),
    ]
    return "\n".join(lines)
