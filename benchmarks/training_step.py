"""What a training step of a draft costs, in forward passes of its frozen target.

The same dialogues go through both: rendered scenes with their exact descriptions as replies, of
which a step learns. The pass is the target's own, of `transformers`, with logits at the reply's
positions only, which makes it as cheap as it can be; a step is the loop's: that pass, the draft's
forward and backward passes, and AdamW. Where the target's states are kept, a first step is one
whose examples have not been through the target yet, and a later one finds their states in memory.

Run `python benchmarks/training_step.py [--threads N]`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

import fastvlm
from fastvlm.data.broken import BrokenRecords
from fastvlm.data.questions import scene_conversations
from fastvlm.training.draft import DraftTask, new_network
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.forcing import ExampleCache, TeacherForcing
from fastvlm.training.processes import Processes
from fastvlm.training.replies import Example, data_replies, questions_of
from fastvlm.training.schedule import Schedule
from fastvlm.training.train_state import TrainState

BATCH = 24
ROUNDS = 8


def examples(vlm: fastvlm.VisionLanguageModel) -> list[Example]:
    """Return scenes with their descriptions."""
    scenes = scene_conversations(range(BATCH), vlm.image_size)
    return data_replies(vlm, questions_of(scenes, BrokenRecords()))


def milliseconds(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median time of each part, all of them measured in turns."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Print a line for each kind of draft."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, help="CPU threads to compute with")
    if (threads := options.parse_args().threads) is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    vlm = fastvlm.load()
    learnt = examples(vlm)
    forced = TeacherForcing(vlm, ExampleCache()).batch(learnt)
    least = int(forced.loss_mask.nonzero()[:, 1].min())

    @torch.no_grad()
    def forward() -> None:
        keep = forced.x.shape[1] - least
        vlm.model(inputs_embeds=forced.x, logits_to_keep=keep, use_cache=False)

    for kind in ("block", "mlp"):
        parts: dict[str, Callable[[], object]] = {
            "forward": forward,
            "step that keeps nothing": step(vlm, kind, learnt, keeps=False),
            "first step": step(vlm, kind, learnt, keeps=True, forgets=True),
            "later step": step(vlm, kind, learnt, keeps=True),
        }
        for part in parts.values():
            part()
        taken = milliseconds(parts)
        pass_ms = taken.pop("forward")
        print(  # noqa: T201
            f"{kind}: one forward pass of the target takes {pass_ms:.0f} ms, "
            + ", ".join(f"a {name} {ms:.0f} ms: {ms / pass_ms:.2f}x" for name, ms in taken.items())
        )


def step(
    vlm: fastvlm.VisionLanguageModel,
    kind: str,
    learnt: list[Example],
    *,
    keeps: bool,
    forgets: bool = False,
) -> Callable[[], None]:
    """Return what takes a step with a new network of a kind."""
    network = new_network(vlm, DraftPlan(kind), learnt)
    task = DraftTask(vlm, {kind: network}, learnt, batch=BATCH)
    task.target.keeps = keeps
    train_state = TrainState(
        task, Schedule(steps=1000, learning_rate=1e-3), Accelerator(), Processes()
    )

    def take() -> None:
        if forgets:
            task.target.kept = ExampleCache()
        losses = train_state.losses(task.draw(0))
        losses.total.backward()
        train_state.step(0, losses.weight)

    return take


if __name__ == "__main__":
    main()
