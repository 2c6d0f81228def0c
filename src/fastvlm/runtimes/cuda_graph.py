"""Passes recorded as CUDA graphs: one launch for the hundreds of kernels of a pass."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlm.functional.errors import first_line

MAX_GRAPHS = 64
"""Graphs that are kept at once; beyond it the one goes that was run longest ago."""

Compute = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""What a pass does, from its inputs to its outputs; it must do the same whatever their values."""


class RecordedPass:
    """A pass of fixed shapes, recorded once.

    Args:
        compute: What it does.
        given: Inputs of the shapes that it takes.
        pool: Where the graphs of a decoder take their memory, one after another.
    """

    def __init__(self, compute: Compute, given: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in given]
        self.graph: Any = torch.cuda.CUDAGraph()
        # Libraries prepare themselves at their first call in a thread, which can't be recorded.
        side: Any = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may prepare images meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = list(compute(self.inputs))

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for some inputs, as tensors of their own."""
        for own, tensor in zip(self.inputs, given, strict=True):
            own.copy_(tensor, non_blocking=True)
        self.graph.replay()
        # The next pass of another graph writes where these lie.
        return [output.clone() for output in self.outputs]


class Recorder:
    """Runs passes, and records those that come again.

    A pass that comes once (most shapes of a prompt) is computed as ever: recording takes as long as
    a few passes.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, RecordedPass | None] = OrderedDict()
        """By what tells passes apart: the recorded pass; None for one that was run once."""
        self._failed = False
        self._pool: Any = None
        self._memory: object = None

    def forget(self) -> None:
        """Forget all that was recorded."""
        self._recorded.clear()
        self._memory = self._pool = None

    def run(
        self, key: Hashable, memory: object, compute: Compute, given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Run a pass.

        Args:
            key: What tells it from other passes, beside the shapes of its inputs.
            memory: What stands for the memory that it reads and writes beside them: where it is
                another object than the last time, nothing of what was recorded is run again.
            compute: What it does.
            given: Its inputs.
        """
        if given[0].device.type != "cuda" or self._failed:
            return compute(given)
        if memory is not self._memory:
            self.forget()
            self._memory, self._pool = memory, torch.cuda.graph_pool_handle()
        key = key, *(tuple(tensor.shape) for tensor in given)
        if key not in self._recorded:
            self._recorded[key] = None
            if len(self._recorded) > MAX_GRAPHS:
                self._recorded.popitem(last=False)
            return compute(given)
        recorded = self._recorded[key]
        if recorded is None:
            try:
                recorded = RecordedPass(compute, given, self._pool)
            except (RuntimeError, AssertionError) as error:
                self._failed = True
                warnings.warn(
                    "A pass can't be recorded as a CUDA graph, so every one is launched kernel by"
                    f" kernel, which is slower: {first_line(error)}.",
                    stacklevel=2,
                )
                return compute(given)
            self._recorded[key] = recorded
        self._recorded.move_to_end(key)
        return recorded.run(given)
