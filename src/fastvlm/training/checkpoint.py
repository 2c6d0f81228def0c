"""A run's last two checkpoints: each is complete or not there, and belongs to one plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastvlm.functional.errors import CheckpointError, first_line, shortened
from fastvlm.functional.files import written_file

State = dict[str, Any]
"""A checkpoint: the plan, the next step, weights, optimiser state, and streams' positions."""
CHECKPOINT_KEYS = ("plan", "step", "streams", "module", "optimiser")


def before(path: Path) -> Path:
    """Return the path of the checkpoint before the last one."""
    return path.with_stem(f"{path.stem}-before")


def write_checkpoint(path: Path, state: State) -> None:
    """Write a checkpoint, and keep the one before it.

    If the process is killed at any moment, at least one of them is intact.

    Raises:
        StorageError: The disk is full, or can't be written to; the earlier checkpoint stays.
    """
    with written_file(path) as beside:
        torch.save(state, beside)
        if path.is_file():
            _keep(path)


def _keep(path: Path) -> None:
    """Give a checkpoint a second name, under which it stays when another takes its place."""
    before(path).unlink(missing_ok=True)
    try:
        os.link(path, before(path))
    except OSError:
        # A disk without hard links; a kill just now leaves it under the second name alone.
        path.replace(before(path))


def read_checkpoint(path: Path, plan: State, processes: int, *, streams: bool) -> State | None:
    """Return the checkpoint to resume from; None if there is none.

    If the last checkpoint is broken, the one before it is returned, with a message.

    Args:
        path: The file.
        plan: All settings and data that the result depends on.
        processes: The number of processes in the run.
        streams: Whether each process draws from a stream of its own.

    Raises:
        CheckpointError: It was written by a run with another plan, or by another number of
            processes with a stream each, or no checkpoint can be read.
    """
    state = _last(path)
    if state is None:
        return None
    if different := list(differences(state["plan"], plan)):
        raise CheckpointError(
            f"{path} was made by a run with {'; '.join(different)}. Resume with the same options"
            " and data, or choose another output."
        )
    if streams and len(state["streams"]) != processes:
        raise CheckpointError(
            f"{path} was made by {len(state['streams'])} processes with a stream of data each, but"
            f" this run has {processes}; resume with as many."
        )
    return state


def _last(path: Path) -> State | None:
    """Return the last checkpoint that can be read; None where none was written."""
    broken = []
    for file in (path, before(path)):
        if not file.is_file():
            continue
        try:
            state: State = torch.load(file, weights_only=True, map_location="cpu")
            missing = [part for part in CHECKPOINT_KEYS if part not in state]
        except Exception as error:  # noqa: BLE001 (of torch, of zipfile and of pickle)
            broken.append(f"{file} can't be read ({first_line(error)})")
            continue
        if missing:
            broken.append(f"{file} holds no {missing[0]}")
            continue
        for what in broken:
            print(  # noqa: T201
                f"{what}; the run goes on from {file.name}, step {state['step']}.",
                file=sys.stderr,
                flush=True,
            )
        return state
    if broken:
        raise CheckpointError(
            f"{' and '.join(broken)}, so the run can't go on; remove it to begin again."
        )
    return None


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yield the differences between a checkpoint's plan and a run's, each in words.

    Args:
        found: The checkpoint's plan.
        wanted: The run's plan.
        prefix: The path to a nested part of the plans, put before each name.
    """
    for name in dict.fromkeys((*found, *wanted)):
        ours, theirs = wanted.get(name), found.get(name)
        if ours == theirs:
            continue
        called = f"{prefix}{name}".replace("_", " ")
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(theirs, ours, f"{called}, ")
        elif isinstance(ours, Mapping) or isinstance(theirs, Mapping):
            yield f"{'no' if theirs is None else 'a'} {called}"
        else:
            yield f"{called} {shortened(repr(theirs))} where this one has {shortened(repr(ours))}"
