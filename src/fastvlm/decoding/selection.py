"""How a row's tokens are chosen from logits: greedy or by sampling, after logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvlm.functional.acceptance import accept_or_replace, draw

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""What `transformers` calls so: (1, length) tokens and (1, vocabulary) scores to new scores."""


@dataclass(slots=True)
class Drawn:
    """A drafted token, and what accepting it needs.

    Args:
        token: The token.
        q: The distribution that it was drawn from, (vocabulary,); None where it was not drawn.
        confidence: The drafter's probability of it.
    """

    token: int
    q: Tensor | None = None
    confidence: float = 1.0


@dataclass(slots=True)
class Selection:
    """How one row chooses its tokens.

    Processors are applied to the target's and to the drafter's logits alike, at each position with
    that position's own prefix, as if every token had been decoded by itself.

    Args:
        processors: Applied in this order. They must be stateless.
        sample: Draw from the distribution; else the likeliest token is taken.
        generator: What random numbers are drawn from; None for torch's own.
        prompt: The tokens that processors see before the reply.
    """

    processors: Sequence[LogitsProcessor] = ()
    sample: bool = False
    generator: torch.Generator | None = None
    prompt: list[int] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, and nothing else plays a part."""
        return not self.sample and not self.processors

    def process(self, reply: Sequence[int], logits: Tensor) -> Tensor:
        """Return the processed logits, (vocabulary,) in at least float32, after a reply so far."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if not self.processors:
            return scores
        seen = torch.tensor([[*self.prompt, *reply]], dtype=torch.long, device=logits.device)
        # Some processors write into what they are given.
        scores = scores[None].clone()
        for processor in self.processors:
            scores = processor(seen, scores)
        return scores[0]

    def choose(self, scores: Tensor) -> int:
        """Return a token by the target's processed logits: (vocabulary,)."""
        if self.sample:
            return draw(scores.softmax(-1), self.generator)
        return int(scores.argmax())

    def propose(self, reply: Sequence[int], logits: Tensor) -> Drawn | None:
        """Return a drafted token by the drafter's logits; None where processors leave it none.

        Args:
            reply: The reply so far, what is drafted included.
            logits: (vocabulary,), minus infinity for what can't be drafted.
        """
        scores = self.process(reply, logits)
        q = scores.softmax(-1)
        if bool(q.isnan().any()):
            return None
        token = draw(q, self.generator) if self.sample else int(scores.argmax())
        return Drawn(token, q if self.sample else None, float(q[token]))

    def accept(
        self,
        reply: Sequence[int],
        draft: Sequence[Drawn],
        logits: Tensor,
    ) -> tuple[int, int]:
        """Accept a draft against the target.

        Args:
            reply: The reply before the draft.
            draft: The draft, g tokens.
            logits: The target's at each position: (g + 1 or more, vocabulary).

        Returns:
            How many drafted tokens are accepted, and the token that follows them.
        """
        seen = list(reply)
        for index, drawn in enumerate(draft):
            scores = self.process(seen, logits[index])
            if self.sample:
                p = scores.softmax(-1)
                other = accept_or_replace(drawn.token, p, drawn.q, self.generator)
            else:
                best = int(scores.argmax())
                other = None if best == drawn.token else best
            if other is not None:
                return index, other
            seen.append(drawn.token)
        return len(draft), self.choose(self.process(seen, logits[len(draft)]))
