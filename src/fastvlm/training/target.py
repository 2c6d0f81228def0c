"""The hidden states of a frozen target, kept if all of them fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlm.functional.best import best_columns
from fastvlm.training.forcing import ExampleCache, Forced, GradientCache, TeacherForcing
from fastvlm.training.replies import Example

MEASURED_EXAMPLES = 16
"""The number of examples from which the memory for all of them is estimated."""
CHUNK_LOGITS = 2**25
"""Logits of all tokens that are computed at a time: with a quarter of a million tokens, those of a
step would take several GB."""
CACHED_LOGITS = 2**19
"""Logits that are summed at a time on a CPU."""


@dataclass(frozen=True, slots=True)
class TargetStates:
    """The hidden states of a target's pass over examples.

    Args:
        states: The hidden states of each exit layer, padded: (batch, length, d_model).
        last: The last layer's hidden states at the positions of the loss: (positions, d_model).
        normaliser: The logarithm of what the exponentials of all logits there add up to:
            (positions,). With it, probabilities of some tokens need their logits alone.
        best: The best tokens there: (positions,).
    """

    states: Mapping[int, Tensor]
    last: Tensor
    normaliser: Tensor
    best: Tensor


class FrozenTarget:
    """Runs a frozen target over examples, and keeps its hidden states if they all fit into memory.

    If they do, as estimated from the first few examples, each example goes through the target by
    itself when it is first drawn. Its states then don't depend on the examples drawn with it, and a
    resumed run computes the same. If they don't, a step's examples go through the target together,
    and nothing is kept.

    Args:
        forcing: Makes the batches.
        exit_layers: The layers whose hidden states are needed.
        examples: All examples of the run.
        kept_bytes: The maximum memory for hidden states, in bytes.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        exit_layers: Sequence[int],
        examples: Sequence[Example],
        kept_bytes: int,
    ) -> None:
        self.forcing, self.exit_layers = forcing, sorted(set(exit_layers))
        self.examples, self.kept = examples, ExampleCache(kept_bytes)

    @cached_property
    def keeps(self) -> bool:
        """Whether states are kept."""
        decoder = self.forcing.vlm.decoder
        looked_at = self.examples[:MEASURED_EXAMPLES]
        prompt = mean(len(self.forcing.prompt(example).token_ids) for example in looked_at)
        positions = sum(
            (prompt + len(example.reply)) * len(self.exit_layers) + len(example.reply)
            for example in self.examples
        )
        return positions * decoder.width * decoder.dtype.itemsize <= self.kept.left

    @cached_property
    def vocabulary(self) -> int:
        """The number of tokens that the LM head knows."""
        decoder = self.forcing.vlm.decoder
        state = torch.zeros(1, decoder.width, dtype=decoder.dtype, device=decoder.device)
        with torch.no_grad():
            return decoder.head(state).shape[-1]

    @torch.no_grad()
    def passed(self, examples: Sequence[Example], forced: Forced) -> TargetStates:
        """Return the target's hidden states of a step's examples.

        Args:
            examples: The examples.
            forced: The batch made of them.
        """
        if not self.keeps:
            return self.run(forced)
        alone = [self.known(example) for example in examples]
        return TargetStates(
            {
                layer: pad_sequence([one.states[layer][0] for one in alone], batch_first=True)
                for layer in self.exit_layers
            },
            torch.cat([one.last for one in alone]),
            torch.cat([one.normaliser for one in alone]),
            torch.cat([one.best for one in alone]),
        )

    def known(self, example: Example) -> TargetStates:
        """Return the hidden states of one example, from the cache if possible."""
        return self.kept.get(
            example,
            lambda: self.run(self.forcing.batch([example])),
            lambda made: (*made.states.values(), made.last, made.normaliser, made.best),
        )

    def run(self, forced: Forced) -> TargetStates:
        """Run the target over a batch."""
        decoder, cache = self.forcing.vlm.decoder, GradientCache()
        x, states, before = forced.x, dict[int, Tensor](), 0
        # What has 16 bits already gains nothing by autocast, which is in the way of packed weights.
        coarse = decoder.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, enabled=False) if coarse else nullcontext():
            for layer in self.exit_layers:
                layers = range(before, layer)
                x = states[layer] = decoder.forward_layers(x, forced.positions, cache, layers)
                before = layer
            last = decoder.forward_layers(x, forced.positions, cache, range(before, decoder.depth))
            last = last[forced.loss_mask]
            return TargetStates(states, last, *self.outlook(last))

    def outlook(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normaliser and the best token of each position, a few positions at a time.

        Args:
            last: The last layer's hidden states, (positions, d_model).
        """
        decoder = self.forcing.vlm.decoder
        normaliser, best = [], []
        positions = max(1, CHUNK_LOGITS // self.vocabulary)
        # So few at a time stay in a core's cache, through which they go several times.
        few = max(1, CACHED_LOGITS // self.vocabulary) if last.device.type == "cpu" else positions
        for chunk in last.split(positions):
            for piece in decoder.head(chunk).split(few):
                logits = full_precision(piece)
                found = best_columns(logits)
                top = logits.gather(-1, found[:, None])
                normaliser.append((logits - top).exp_().sum(-1).log_() + top[:, 0])
                best.append(found)
        return torch.cat(normaliser), torch.cat(best)


def full_precision(logits: Tensor) -> Tensor:
    """Return logits in float32 at least, in their shape: bfloat16 is too coarse for a softmax."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
