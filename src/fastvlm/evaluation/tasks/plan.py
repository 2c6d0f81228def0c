"""What an evaluation asks, of which strategies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastvlm.data.tasks import LOADERS, EvaluationTask, Item
from fastvlm.functional.digests import digest
from fastvlm.functional.errors import InputError


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """One question: an item of a task, its image shown in one size.

    Args:
        task: The task's name.
        item: The item.
        size: Side of the image in pixels; None for the model's own.
    """

    task: str
    item: Item
    size: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """An evaluation.

    Args:
        model: What the model is called.
        tasks: By the names that were typed, each with the items to ask.
        strategies: By name, what each is; the first is what the others are compared with.
        sizes: Sides in pixels of the images; None for the model's own.
        max_new_tokens: The most tokens of a reply.
        dtype: The precision.
        threads: CPU threads.
        device: Where it is computed.
        weights: What tells the model's weights from others.
    """

    model: str
    tasks: Mapping[str, EvaluationTask[Any]]
    strategies: Mapping[str, Mapping[str, Any]]
    sizes: Sequence[int | None]
    max_new_tokens: int
    dtype: str
    threads: int
    device: str = "cpu"
    weights: str = ""

    def __iter__(self) -> Iterator[PlannedItem]:
        """Yield the questions, an item in all sizes before the next."""
        for name, task in self.tasks.items():
            for item in task.items:
                for size in self.sizes:
                    yield PlannedItem(name, item, size)

    def to_json(self) -> dict[str, Any]:
        """Return what tells this evaluation from others."""
        return {
            "model": self.model,
            "weights": self.weights,
            "tasks": {
                name: {
                    "name": task.name,
                    "items": len(task.items),
                    "digest": digest([identity(one) for one in task.items]),
                }
                for name, task in self.tasks.items()
            },
            "strategies": {name: dict(what) for name, what in self.strategies.items()},
            "sizes": list(self.sizes),
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
            "threads": self.threads,
            "device": self.device,
        }


def identity(item: Item) -> list[Any]:
    """Return what tells an item from others; a file's contents don't, as it may be mended."""
    image = item.image
    return [item.id, item.prompt, image.name if isinstance(image, Path) else image]


def read_tasks(
    names: Sequence[str], data: Path, limit: int | None, prompts: Mapping[str, str]
) -> dict[str, EvaluationTask[Any]]:
    """Return tasks by the names that were typed.

    Args:
        names: Such as `vqav2`, or `flickr8k:dev` for another split than the usual one.
        data: A folder with one for each task, under the task's name.
        limit: The most items of each, spread evenly over it; None for all.
        prompts: By task, what to ask instead of its own words.

    Raises:
        InputError: There is no such task, split or folder, the task's files are not there, or the
            items of a task have prompts of their own.
    """
    tasks: dict[str, EvaluationTask[Any]] = {}
    for name in names:
        task = read_task(name, data)
        if limit is not None and limit < len(task.items):
            step = len(task.items) / limit
            items = tuple(task.items[int(number * step)] for number in range(limit))
            task = with_items(task, items)
        if name in prompts:
            if len({item.prompt for item in task.items}) > 1:
                raise InputError(
                    f"Each item of {name} has a question of its own; leave out --prompt."
                )
            asked = tuple(replace(item, prompt=prompts[name]) for item in task.items)
            task = with_items(task, asked)
        tasks[name] = task
    if unknown := [name for name in prompts if name not in tasks]:
        raise InputError(f"--prompt names {unknown[0]!r}, which is none of {', '.join(tasks)}.")
    return tasks


def loader_of(typed: str) -> tuple[str, Callable[..., EvaluationTask[Any]]]:
    """Return the folder name of a task, `NAME` or `NAME:SPLIT`, and what reads that folder.

    Raises:
        InputError: There is no such task or split.
    """
    name, _, split = typed.partition(":")
    loader: Callable[..., EvaluationTask[Any]] | None = LOADERS.get(name.replace("-", "_"))
    if loader is None:
        known = ", ".join(one.replace("_", "-") for one in LOADERS)
        raise InputError(f"The tasks are {known}; got {typed!r}.")
    if not split:
        return name, loader
    if "split" not in inspect.signature(loader).parameters:
        raise InputError(f"{name} has one split only; got {typed!r}.")
    return name, partial(loader, split=split)


def read_task(typed: str, data: Path) -> EvaluationTask[Any]:
    """Read a task, `NAME` or `NAME:SPLIT`. See `read_tasks`.

    Raises:
        InputError: There is no such task or split, or its files are missing or broken.
    """
    name, load = loader_of(typed)
    folder = data / name
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} with the files of {name}.")
    return load(folder)


def with_items(task: EvaluationTask[Any], items: Sequence[Item]) -> EvaluationTask[Any]:
    """Return a task with other items; every task is a dataclass with such a field."""
    return replace(task, items=items)  # type: ignore[type-var]
