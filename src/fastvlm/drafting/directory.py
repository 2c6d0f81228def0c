"""A draft's directory: read, and checked against its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.functional.errors import CheckpointError, first_line
from fastvlm.functional.placement import moved


def load_draft(directory: str | Path, target: PreTrainedModel) -> ImitationNetwork:
    """Load an imitation network for a target, in the target's precision and on its device.

    Raises:
        CheckpointError: There is no draft in the directory, it is broken, or it was made for
            another target.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"There is no draft in {path}: config.json is missing.")
    try:
        # transformers' annotation knows the model alone, not the pair that this option gives.
        loaded: Any = ImitationNetwork.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise CheckpointError(f"The draft in {path} can't be read: {first_line(error)}") from error
    network: ImitationNetwork = loaded[0]
    found: dict[str, set[str]] = loaded[1]
    # transformers fills what is missing with random weights.
    for what in ("missing", "unexpected"):
        if keys := found[f"{what}_keys"]:
            raise CheckpointError(
                f"The draft in {path} can't be read: {', '.join(sorted(keys))}"
                f" {'is' if len(keys) == 1 else 'are'} {what}."
            )
    made_for, is_for = network.config.target, fingerprint(target)
    if made_for != is_for:
        raise CheckpointError(
            f"The draft in {path} was made for another model: its target's fingerprint is"
            f" {made_for}, this model's is {is_for}."
        )
    return moved(network, target.device, target.dtype).eval()
