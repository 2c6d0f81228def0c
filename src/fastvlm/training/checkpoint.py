"""A run's checkpoint: written whole or not at all, and refused by a run that it is not of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastvlm.functional.errors import CheckpointError

State = dict[str, Any]
"""What a checkpoint holds: the plan, the next step, weights, optimiser, and streams' positions."""


def write_checkpoint(path: Path, state: object) -> None:
    """Write beside the file, then rename, so that a kill leaves the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    beside.replace(path)


def read_checkpoint(path: Path, plan: State, processes: int, *, streams: bool) -> State | None:
    """Return what a run with this plan goes on from; None where nothing was written.

    Args:
        path: The file.
        plan: What decides the run's weights.
        processes: Processes of the run.
        streams: Whether each process draws from a stream of its own.

    Raises:
        CheckpointError: It was written by a run with another plan, or by another number of
            processes with a stream each.
    """
    if not path.is_file():
        return None
    state: State = torch.load(path, weights_only=True, map_location="cpu")
    if state["plan"] != plan:
        raise CheckpointError(
            f"{path} was made by a run with {state['plan']}, but this one has {plan}; resume"
            " with the same options or choose another output."
        )
    if streams and len(state["streams"]) != processes:
        raise CheckpointError(
            f"{path} was made by {len(state['streams'])} processes with a stream of data each, but"
            f" this run has {processes}; resume with as many."
        )
    return state
