"""Which exit layer to draft from: a few are taught for a while, and the fastest is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list

from fastvlm.functional.files import write_json
from fastvlm.functional.text_files import read_json
from fastvlm.training.draft import train_draft
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.held_out import Decoded, decode_held_out
from fastvlm.training.processes import this_process
from fastvlm.training.replies import Example, TrainingPrompt
from fastvlm.training.schedule import Schedule
from fastvlm.vlm import VisionLanguageModel


def exits_to_try(depth: int) -> list[int]:
    """Return a few exit layers of a decoder: the first two, an eighth of it and a quarter."""
    return sorted({layer for layer in (1, 2, depth // 8, depth // 4) if 1 <= layer < depth})


def choose_exit_layer(
    vlm: VisionLanguageModel,
    plan: DraftPlan,
    examples: Sequence[Example],
    held_out: Sequence[TrainingPrompt],
    output: Path,
    schedule: Schedule,
) -> tuple[int, Mapping[int, Decoded]]:
    """Return the exit layer that decodes held-out questions fastest, and how each one did.

    The choice is kept: another measurement might find another layer, and a run that goes on would
    then be another run. Where it is known from before, nothing is decoded.

    What counts is tokens per second on this machine, which is what acceptance and the costs of
    layers come to.

    Args:
        vlm: The target.
        plan: What is to be trained; its exit layer is not read.
        examples: What it learns from.
        held_out: The questions to decode.
        output: Where the short run is kept; when it is there, it is not done again.
        schedule: Of the short run.
    """
    tried = {layer: replace(plan, exit_layer=layer) for layer in exits_to_try(vlm.decoder.depth)}
    plans = {f"exit-{layer}": of for layer, of in tried.items()}
    # Of a run with other options, it is refused here.
    networks = train_draft(vlm, plans, examples, output, schedule)
    file = output / "choice.json"
    if file.is_file():
        known = read_json(file)
        if isinstance(known, dict) and known.get("exit_layer") in tried:
            return known["exit_layer"], {}
    found = decode_held_out(vlm, networks, held_out)
    decoded = {layer: found[f"exit-{layer}"] for layer in tried}
    # Each process measures, and all take what the first one found.
    [best] = broadcast_object_list(
        [max(decoded, key=lambda layer: decoded[layer].tokens_per_second)]
    )
    if this_process().is_main_process:
        write_json(file, {"exit_layer": best})
    return best, decoded
