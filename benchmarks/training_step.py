"""What a training step of a draft costs, in forward passes of its frozen target.

The same dialogues go through both: rendered scenes with their exact descriptions as replies, of
which a step learns. The pass is the target's own, of `transformers`, with logits at the reply's
positions only, which makes it as cheap as it can be; a step is the loop's: that pass, the draft's
forward and backward passes, and AdamW.

Run `python benchmarks/training_step.py [--threads N]`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

import fastvlm
from fastvlm.data.questions import about_scenes
from fastvlm.scenes import describe, sample
from fastvlm.training.draft import DraftLesson, DraftPlan, new_network
from fastvlm.training.learner import Learner
from fastvlm.training.processes import Processes
from fastvlm.training.replies import Dialogue
from fastvlm.training.schedule import Schedule

BATCH = 24
ROUNDS = 8


@torch.no_grad()
def dialogues(vlm: fastvlm.VisionLanguageModel) -> list[Dialogue]:
    """Return scenes with their descriptions."""
    made = []
    for question in about_scenes(range(BATCH)):
        request = vlm.request(question.prompt, question.open(vlm.image_size))
        reply = vlm.tokenizer.encode(describe(sample(int(question.picture))))
        places = torch.tensor(request.tokens) == vlm.model.config.image_token_id
        features = request.embeddings[places].clone()
        made.append(Dialogue(request.tokens + reply, len(request.tokens), features))
    return made


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
    learnt = dialogues(vlm)
    tokens = pad_sequence([torch.tensor(d.tokens) for d in learnt], batch_first=True)
    least = min(d.reply_start for d in learnt)

    @torch.no_grad()
    def forward() -> None:
        x = vlm.decoder.embed(tokens)
        vlm.model(inputs_embeds=x, logits_to_keep=tokens.shape[1] - least, use_cache=False)

    for kind in ("block", "mlp"):
        network = new_network(vlm, DraftPlan(kind), learnt)
        lesson = DraftLesson(vlm, [network], learnt, batch=BATCH)
        schedule = Schedule(steps=1000, learning_rate=1e-3)
        learner = Learner(lesson, schedule, Accelerator(), Processes())

        def step(lesson: DraftLesson = lesson, learner: Learner = learner) -> None:
            losses = learner.losses(lesson.draw(0))
            losses.total.backward()
            learner.step(0, losses.weight)

        parts: dict[str, Callable[[], object]] = {"forward": forward, "step": step}
        for part in parts.values():
            part()
        taken = milliseconds(parts)
        print(  # noqa: T201
            f"{kind}: a step takes {taken['step']:.0f} ms, one forward pass of the target"
            f" {taken['forward']:.0f} ms: {taken['step'] / taken['forward']:.2f}x"
        )


if __name__ == "__main__":
    main()
