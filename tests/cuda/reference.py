"""Replies of transformers' own generate on a device, and how close a call each token was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.imitation import initialise_from
from fastvlm.language import split_decoder
from tests.families import DEPTH, Inputs

TIES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.06, torch.bfloat16: 0.5}
"""Rounding alone may decide between two best logits that lie closer than this."""


@dataclass(frozen=True)
class Reference:
    """Replies, and the gap between the two best logits at each of their tokens."""

    replies: list[list[int]]
    gaps: list[list[float]]
    tie: float

    def assert_equal(self, found: Sequence[Sequence[int]]) -> None:
        """Check that replies are the reference's, up to a token that rounding may decide."""
        assert len(found) == len(self.replies)
        for reply, expected, gaps in zip(found, self.replies, self.gaps, strict=True):
            differing = (n for n, (a, b) in enumerate(zip(reply, expected, strict=False)) if a != b)
            first = next(differing, min(len(reply), len(expected)))
            if first < max(len(reply), len(expected)):
                assert first < len(gaps), f"{reply} goes on after {expected}"
                assert gaps[first] < self.tie, (
                    f"{reply} is not {expected}: {gaps[first]} at {first}"
                )


def placed(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def reference(
    model: PreTrainedModel, inputs: Inputs, limit: int, ends: frozenset[int]
) -> Reference:
    out: Any = model.generate(
        **inputs,
        max_new_tokens=limit,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best: Tensor = torch.stack(out.logits).topk(2).values
    return Reference(
        replies_in(out.sequences, len(out.logits), ends),
        (best[..., 0] - best[..., 1]).T.tolist(),
        TIES[out.logits[0].dtype if model.dtype == torch.float64 else model.dtype],
    )


def replies_in(sequences: Tensor, steps: int, ends: frozenset[int]) -> list[list[int]]:
    """Return the last steps of sequences, each up to its end token."""
    rows = sequences[:, -steps:].tolist()
    return [
        row[: 1 + next((n for n, token in enumerate(row) if token in ends), steps)] for row in rows
    ]


def draft_for(model: PreTrainedModel, *, perfect: bool = False) -> ImitationNetwork:
    """Return a draft of one block, or of all layers from the exit layer on."""
    decoder = split_decoder(model)
    torch.manual_seed(1)
    network = ImitationNetwork(
        ImitationConfig(
            kind="block",
            exit_layer=1,
            blocks=DEPTH - 1 if perfect else 1,
            text_config=decoder.decoder.config.to_dict(),
        )
    )
    initialise_from(network, decoder.layers)
    return network.to(model.device, model.dtype).eval()
