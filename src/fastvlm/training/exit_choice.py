"""Choosing the exit layer: train drafts at a few layers briefly, and keep the fastest."""

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
    """Return the exit layers to try: the first two, an eighth and a quarter of the decoder."""
    return sorted({layer for layer in (1, 2, depth // 8, depth // 4) if 1 <= layer < depth})


def choose_exit_layer(
    vlm: VisionLanguageModel,
    plan: DraftPlan,
    examples: Sequence[Example],
    held_out: Sequence[TrainingPrompt],
    output: Path,
    schedule: Schedule,
) -> tuple[int, Mapping[int, Decoded]]:
    """Return the exit layer that decodes held-out questions fastest, and the result of each.

    The choice is written to disk and reused: another measurement might choose another layer, and a
    resumed run would then be a different one.

    The criterion is tokens per second on this machine.

    Args:
        vlm: The target.
        plan: The draft to train; its exit layer is ignored.
        examples: The training examples.
        held_out: The questions to decode.
        output: The folder of the short run and of its result, which is reused if it is there.
        schedule: The schedule of the short run.
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
