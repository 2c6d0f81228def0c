"""What a pass must read and compute at least, beside what the machine can: the roofline.

Weights alone are counted: keys and values, norms and the calling of operators come on top, and a
layer of experts is counted whole. So a share of the limit is what is left to gain by faster passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastvlm.decoding import Strategy
from fastvlm.evaluation.benchmark import StrategyResult
from fastvlm.functional.packed import PackedLinear
from fastvlm.language import SplitDecoder
from fastvlm.language.quantised import Int4Linear, Int8Linear

READ_VALUES = {"cpu": 2**26, "cuda": 2**28}
"""Values in float32 that are read to measure the memory: more than caches hold, and so many that to
begin takes no share of it."""
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied to measure the arithmetic."""
TRIALS = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine can do, as measured.

    Args:
        bytes_per_second: What it reads of its memory.
        operations_per_second: What it multiplies and adds in the model's precision.
    """

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a pass takes at least.

    Args:
        name: Which pass: `step`, or of a strategy `draft` and `verify`.
        strategy: The strategy.
        width: The positions that it computes.
        weight_bytes: The bytes of weights that it reads.
        operations: Its multiplications and additions.
        limit_ms: What they take at least.
    """

    name: str
    strategy: str
    width: float
    weight_bytes: int
    operations: float
    limit_ms: float


class Share(NamedTuple):
    """How near a strategy comes to the limit.

    Args:
        limit_ms: What a token takes at least, with the drafts and acceptance that were measured.
        share: Of that in what a token took; None where no reply was long enough.
    """

    limit_ms: float
    share: float | None


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a machine, in less than a second."""
    kind = device.type if device.type in READ_VALUES else "cuda"
    size = MATRIX_SIZE[kind]
    values = torch.ones(READ_VALUES[kind], device=device)
    matrix = torch.rand(size, size, device=device, dtype=dtype)
    reading = _best(values.sum, device)
    multiplying = _best(lambda: matrix @ matrix, device)
    return Machine(values.nbytes / reading, 2 * size**3 / multiplying)


def pass_costs(
    decoder: SplitDecoder,
    strategies: dict[str, Strategy],
    results: Iterable[StrategyResult],
    machine: Machine,
) -> list[PassCost]:
    """Return what the passes of strategies take at least.

    Args:
        decoder: The decoder.
        strategies: The strategies by their names.
        results: What was measured of them, which says how wide their passes are.
        machine: The machine.
    """
    whole = [*decoder.layers, decoder.lm_head]
    bits = decoder.bits
    costs = [_cost(("step", "autoregressive"), whole, 1, machine, bits)]
    for result in results:
        strategy: Any = strategies.get(result.strategy)
        if strategy is None or not result.draft_length:
            continue
        network: Any = getattr(strategy, "network", None)
        if network is not None:
            drafting = [*list(decoder.layers)[: strategy.exit_layer], network]
            costs.append(_cost(("draft", result.strategy), drafting, 1, machine, bits))
        width = 1 + result.draft_length
        costs.append(_cost(("verify", result.strategy), whole, width, machine, bits))
    return costs


def shares(costs: Iterable[PassCost], results: Iterable[StrategyResult]) -> dict[str, Share]:
    """Return how near strategies come to the limit, by their names."""
    known = {(cost.strategy, cost.name): cost.limit_ms for cost in costs}
    found = {}
    for result in results:
        name, drafts = result.strategy, result.draft_length or 0
        limit = known.get((name, "verify"), known["autoregressive", "step"])
        limit += drafts * known.get((name, "draft"), 0)
        if (name, "verify") in known:
            limit /= result.acceptance_length or 1
        took = None if result.tpot_ms is None else result.tpot_ms.median
        found[name] = Share(limit, None if not took else limit / took)
    return found


def to_json(machine: Machine, costs: Iterable[PassCost], found: dict[str, Share]) -> dict[str, Any]:
    """Return a roofline as it is written into figures."""
    return {
        **asdict(machine),
        "passes": [asdict(cost) for cost in costs],
        "shares": {name: share._asdict() for name, share in found.items()},
    }


def weights_of(module: nn.Module) -> tuple[int, int]:
    """Return the weights that a pass multiplies by, and the bytes that it reads them in."""
    weights = size = 0
    for part in module.modules():
        if isinstance(part, PackedLinear):
            weights += part.weight.numel()
            size += part.packed.product.read_bytes
        elif isinstance(part, Int8Linear | Int4Linear):
            weights += part.out_features * part.in_features
            halves = 1 if isinstance(part, Int4Linear) else 2
            size += part.out_features * part.in_features * halves // 2
        else:
            for parameter in part.parameters(recurse=False):
                weights += parameter.numel()
                size += parameter.nbytes
    return weights, size


def _cost(
    named: tuple[str, str],
    modules: Iterable[nn.Module],
    width: float,
    machine: Machine,
    bits: int | None,
) -> PassCost:
    counted = [weights_of(module) for module in modules]
    weights = sum(number for number, _ in counted)
    operations = 2 * width * weights
    size = sum(own for _, own in counted) if bits is None else weights * bits // 8
    seconds = max(size / machine.bytes_per_second, operations / machine.operations_per_second)
    return PassCost(*named, width, size, operations, 1e3 * seconds)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
