"""What makes a good draft: every choice of the training, one at a time, on the example model.

The networks that learn from the same replies are taught side by side, from one pass of the model
for all of them, and measured by decoding scenes and photos that none has seen, interleaved in
one run. A stopped run goes on; a finished one is measured again. Run `python benchmarks/ablation.py
--photos FLICKR8K --output DIR [--steps N] [--threads N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastvlm
from fastvlm.data.broken import BrokenRecords
from fastvlm.data.captioned import read_flickr8k
from fastvlm.data.questions import scene_conversations
from fastvlm.drafting import ImitationNetwork
from fastvlm.evaluation.measuring import hardware
from fastvlm.evaluation.tasks.runner import commit
from fastvlm.functional.placement import moved
from fastvlm.prompts import question
from fastvlm.training.draft import train_draft
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.held_out import decode_held_out
from fastvlm.training.loop import Schedule
from fastvlm.training.replies import TrainingPrompt, data_replies, own_replies, questions_of
from fastvlm.training.validation import DRAFT_TOKENS, HeldOut
from fastvlm_example import DESCRIPTION_PROMPT, HELD_OUT_SCENES, SENTENCE_PROMPT
from figures import ablation

USUAL = DraftPlan()
OWN = {
    "usual: block, exit layer 1, as layer 1, KL + cos + CE, own replies, 1,024 tokens": USUAL,
    "mlp": replace(USUAL, kind="mlp"),
    "mlp, exit layer 2": replace(USUAL, kind="mlp", exit_layer=2),
    "mlp, exit layer 4": replace(USUAL, kind="mlp", exit_layer=4),
    "mlp, random start": replace(USUAL, kind="mlp", random_start=True),
    "random start": replace(USUAL, random_start=True),
    "exit layer 2": replace(USUAL, exit_layer=2),
    "exit layer 4": replace(USUAL, exit_layer=4),
    "exit layer 6": replace(USUAL, exit_layer=6),
    "KL alone": replace(USUAL, cosine=0, cross_entropy=0),
    "KL + cos": replace(USUAL, cross_entropy=0),
    "KL + CE": replace(USUAL, cosine=0),
    "64 tokens": replace(USUAL, draft_vocabulary=64),
    "all tokens": replace(USUAL, draft_vocabulary=0),
}
DATA = {"the data set's replies": USUAL}


def about(photos: Sequence[Path], captions: Sequence[str]) -> list[TrainingPrompt]:
    """Return a question for a sentence about each photo, with a person's sentence."""
    return [
        TrainingPrompt(path.name, tuple(question(SENTENCE_PROMPT, path)), caption)
        for path, caption in zip(photos, captions, strict=True)
    ]


def described(photos: Sequence[Path]) -> list[TrainingPrompt]:
    """Return a question for a description of each photo, which nobody has written."""
    return [
        TrainingPrompt(path.name, tuple(question(DESCRIPTION_PROMPT, path)), "") for path in photos
    ]


def main() -> None:
    """Train what is not trained yet, and measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="in Flickr8k's layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--limit", type=int, default=250, help="photos to learn from")
    parser.add_argument("--held-out", type=int, default=10, help="of scenes and of photos")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vlm = fastvlm.load(prefix_bytes=0)
    broken = BrokenRecords()
    scenes = questions_of(scene_conversations(range(options.scenes), vlm.image_size), broken)
    shown = read_flickr8k(options.photos, "train")[: options.limit]
    paths = [photo.path for photo in shown]
    asked = [*scenes, *about(paths, [photo.captions[0] for photo in shown])]
    schedule = Schedule(steps=options.steps, learning_rate=1e-3, warmup=20)
    own = own_replies(vlm, asked + described(paths), options.output, broken)
    networks: dict[str, ImitationNetwork] = {}
    for plans, examples, name in (
        (OWN, own, "own"),
        (DATA, data_replies(vlm, asked), "data"),
    ):
        numbered = {f"{name}-{number}": plan for number, plan in enumerate(plans.values())}
        made = train_draft(vlm, numbered, examples, options.output / name, schedule)
        networks |= dict(zip(plans, made.values(), strict=True))
    seeds = range(HELD_OUT_SCENES, HELD_OUT_SCENES + options.held_out)
    unseen = read_flickr8k(options.photos, "dev")[: options.held_out]
    held_out = {
        "scenes": questions_of(scene_conversations(seeds, vlm.image_size), broken),
        "photos": described([photo.path for photo in unseen]),
    }
    networks = {name: moved(network, vlm.decoder.dtype) for name, network in networks.items()}
    drafts: dict[str, dict[str, Any]] = {name: {} for name in networks}
    for part, of in held_out.items():
        found = decode_held_out(vlm, networks, of)
        # Drafts that adapt are longer where more is accepted; these are all equally long.
        equal = HeldOut(vlm, networks, of, max_new_tokens=160)(0)
        for name in networks:
            fixed = equal[f"held-out {name} acceptance_rate"]
            drafts[name][part] = {**asdict(found[name]), f"acceptance_of_{DRAFT_TOKENS}": fixed}
    record = {
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "steps": options.steps,
        "replies": len(own),
        "held_out": options.held_out,
        "drafts": drafts,
    }
    print(ablation(record))  # noqa: T201
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
