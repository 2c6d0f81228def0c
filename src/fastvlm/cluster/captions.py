"""Captions on Ray: parts are Ray Data's rows, and its actors hold a model each."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from fastvlm.captioning.loop import CaptionJob, NumberedPart, PartResult, caption_parts
from fastvlm.cluster.connection import connected, needed_ray
from fastvlm.functional.errors import FastVlmError, InputError

PARTS_AT_A_TIME = 2
"""Parts that a worker has in its batch: the second fills the slots that the first leaves free."""
ACCELERATORS = ("cuda", "xpu", "hpu")
"""Devices that Ray counts as GPUs."""


def caption_on_ray(
    job: CaptionJob,
    parts: Sequence[NumberedPart],
    workers: int | None,
    address: str | None,
    device: str,
) -> Generator[PartResult]:
    """Caption parts on Ray, and yield each when it is finished, in any order.

    What goes through Ray are the parts' places, and their counts back: images and captions never.
    A worker that dies is started again, and its unfinished parts are done again.

    Args:
        job: What is done.
        parts: The parts with their numbers.
        workers: Processes that hold a model each; None for as many as the cluster has room for.
        address: The cluster; None for this machine alone.
        device: Where a worker computes.

    Raises:
        InputError: Ray is not installed, there is no cluster or no room in it, or a part can't be
            read.
        FastVlmError: Another error of a worker.
    """
    needed_ray("ray.data")
    with connected(address, workers) as ray:
        on_gpu = device.partition(":")[0] in ACCELERATORS
        count = workers or room(ray, on_gpu)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [{"part": pickle.dumps(part)} for part in parts]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            CaptionWorker,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(count, len(rows)),
                max_concurrent_calls_per_actor=PARTS_AT_A_TIME,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
        )
        for row in results.iter_rows():
            found = pickle.loads(row["result"])
            if isinstance(found, FastVlmError):
                raise found
            yield found


class CaptionWorker:
    """An actor of Ray Data's with a model.

    Args:
        job: What is done.
    """

    def __init__(self, job: CaptionJob) -> None:
        self.job = job
        self.error: FastVlmError | None = None
        try:
            self.vlm = job.load()
            self.strategy = job.strategy(self.vlm)
        except FastVlmError as error:
            # Told with the first part: Ray Data would start other workers, which fail alike.
            self.error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Caption parts; other calls of the same worker share the engine's batch."""
        parts: list[NumberedPart] = [pickle.loads(part) for part in batch["part"]]
        try:
            found: list[PartResult | FastVlmError] = list(self._caption(parts))
        except FastVlmError as error:
            found = [error]
        return {"result": [pickle.dumps(one) for one in found]}

    def _caption(self, parts: Sequence[NumberedPart]) -> Iterator[PartResult]:
        if self.error is not None:
            raise self.error
        job = self.job
        yield from caption_parts(
            self.vlm,
            parts,
            job.question,
            job.files,
            strategy=self.strategy,
            image_threads=job.image_threads,
        )


def room(ray: Any, on_gpu: bool) -> int:
    """Return how many workers a cluster has room for.

    Args:
        ray: Ray, connected to the cluster.
        on_gpu: Whether each needs a GPU; otherwise each has a machine.

    Raises:
        InputError: There is no room.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if on_gpu:
        count = sum(int(resources.get("GPU", 0)) for resources in nodes)
    else:
        count = sum(resources.get("CPU", 0) >= 1 for resources in nodes)
    if not count:
        raise InputError(f"The Ray cluster has no {'GPU' if on_gpu else 'CPU'} to work on.")
    return count
