"""The cycle: draft, verify, accept, commit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.decoding.batch import Batch
from fastvlm.decoding.prefill import prefill, remember
from fastvlm.decoding.request import Request
from fastvlm.decoding.strategies import Draft, Drafter
from fastvlm.functional.acceptance import accept_greedy
from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder


class Decoding:
    """Decodes a batch of requests with one strategy.

    Rows accept different numbers of tokens, each with its own length in the cache; those that have
    finished leave the batch.

    Args:
        decoder: The target.
        drafter: The strategy.
        requests: The rows.
        width: Positions that every pass of the layers from the exit layer on computes, however few
            are asked for; None for those that are. A product of matrices rounds otherwise when it
            has other rows beside it, and in bfloat16 that changes tokens. With one width for all,
            and the same exit layer, drafting changes nothing to the last bit of a single request.

    Raises:
        InputError: A prompt doesn't fit into the model's context, the limit is below 1, or drafts
            are longer than the width allows.
    """

    def __init__(
        self,
        decoder: SplitDecoder,
        drafter: Drafter,
        requests: Sequence[Request],
        width: int | None = None,
    ) -> None:
        self.decoder, self.drafter, self.requests = decoder, drafter, list(requests)
        self.width = width
        if width is not None and width <= drafter.margin:
            raise InputError(
                f"Drafts of up to {drafter.margin} tokens are verified {drafter.margin + 1} wide,"
                f" but the width is {width}."
            )
        for request in self.requests:
            if request.max_new_tokens < 1:
                raise InputError(
                    f"max_new_tokens must be at least 1; got {request.max_new_tokens}."
                )
            if len(request.tokens) >= decoder.context:
                raise InputError(
                    f"The prompt has {len(request.tokens)} tokens with its picture, but the"
                    f" model's context is {decoder.context}."
                )
            # What doesn't fit into the context is not asked of a model that never learnt it.
            request.max_new_tokens = min(
                request.max_new_tokens, decoder.context - len(request.tokens)
            )
        self.rows = list(range(len(self.requests)))
        """Which request each row of the batch decodes."""
        # The last token is never written, but a draft's tokens are before they are rejected.
        spare = drafter.margin if width is None else width - 1
        capacity = max(len(r.tokens) + r.max_new_tokens for r in self.requests) + spare
        cache = decoder.cache(len(self.requests), capacity, drafter.cache_layers)
        for row, request in enumerate(self.requests):
            cache.seat(row, request.positions, request.memory)
        self.batch = Batch(
            decoder,
            cache,
            last=[],
            history=[list(request.tokens) for request in self.requests],
            replies=[request.reply for request in self.requests],
            selections=[request.selection for request in self.requests],
            end_tokens=frozenset().union(*(request.end_tokens for request in self.requests)),
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Yield, after the prefill and after each cycle, how many tokens each row gained."""
        yield self.prefill()
        while self.rows:
            yield self.cycle()

    @torch.inference_mode()
    def prefill(self) -> list[int]:
        """Compute the prompts and each row's first token."""
        logits = self.decoder.head(prefill(self.batch, self.requests, self.drafter))
        self.batch.vocabulary_size = logits.shape[-1]
        chosen = self.accept(Draft([[] for _ in self.requests]), logits)
        return self.commit(chosen, logits)

    @torch.inference_mode()
    def cycle(self) -> list[int]:
        """Draft, verify, accept and commit once."""
        running = [self.requests[index] for index in self.rows]
        room = [request.max_new_tokens - len(request.reply) - 1 for request in running]
        draft = self.drafter.draft(self.batch, room)
        logits, hidden = self.verify(draft)
        chosen = self.accept(draft, logits)
        lengths = self.batch.cache.lengths
        self.batch.cache.lengths = [
            length + len(tokens) for length, tokens in zip(lengths, chosen, strict=True)
        ]
        self.drafter.commit(hidden, [len(tokens) - 1 for tokens in chosen])
        proposed = [len(tokens) for tokens in draft.drawn]
        for request, number, tokens in zip(running, proposed, chosen, strict=True):
            request.proposed.append(number)
            request.accepted.append(len(tokens) - 1)
        return self.commit(chosen, logits)

    def accept(self, draft: Draft, logits: Tensor) -> list[list[int]]:
        """Return what each row gains: the drafted tokens that it accepts, and one of the target's.

        Args:
            draft: What was proposed.
            logits: The target's, (batch, g + 1, vocabulary).
        """
        drafted = draft.tokens
        if self.batch.plain:
            found = [
                accept_greedy(tokens, best)
                for tokens, best in zip(drafted, logits.argmax(-1).tolist(), strict=True)
            ]
        else:
            found = [
                selection.accept(self.batch.replies[row], draft.drawn[row], logits[row])
                for row, selection in enumerate(self.batch.selections)
            ]
        return [
            [*tokens[:count], following]
            for tokens, (count, following) in zip(drafted, found, strict=True)
        ]

    def verify(self, draft: Draft) -> tuple[Tensor, Tensor | None]:
        """Run the full model over the last committed tokens and the drafts.

        What drafting has computed is not computed again: the first layers run on the last drafted
        token only, and the others on all hidden states.

        Returns:
            The target's logits, (batch, g + 1, vocabulary), and the exit layer's hidden states,
            (batch, g + 1, d_model), or None for a strategy without an exit layer.
        """
        decoder, cache, exit_layer = self.decoder, self.batch.cache, self.drafter.exit_layer
        drafted = draft.tokens
        width = 1 + max(map(len, drafted))
        known = 0 if draft.hidden is None else draft.hidden.shape[1]
        inputs = [
            ([last, *tokens] + [last] * width)[known:width]
            for last, tokens in zip(self.batch.last, drafted, strict=True)
        ]
        x = decoder.embed(torch.tensor(inputs, device=decoder.device))
        if exit_layer:
            rest = cache.span([length + known for length in cache.lengths], width - known)
            x = decoder.run(x, rest, cache, range(exit_layer))
            if draft.hidden is not None:
                x = torch.cat((draft.hidden, x), 1)
        hidden = x if exit_layer else None
        if self.width is not None:
            x = F.pad(x, (0, 0, 0, self.width - width))
        span = cache.span(cache.lengths, x.shape[1], to_the_end=self.width is not None)
        x = decoder.run(x, span, cache, range(exit_layer, decoder.depth))
        return decoder.head(x)[:, :width], hidden

    def commit(self, chosen: list[list[int]], logits: Tensor) -> list[int]:
        """Give each row its tokens; return how many each request gained.

        Args:
            chosen: The tokens.
            logits: The target's, (batch, g + 1, vocabulary).
        """
        now = time.perf_counter()
        gained = [0] * len(self.requests)
        batch = self.batch
        batch.last = [tokens[-1] for tokens in chosen]
        going = []
        for row, (index, tokens) in enumerate(zip(self.rows, chosen, strict=True)):
            request = self.requests[index]
            batch.history[row] += tokens
            gained[index] = request.take(tokens, len(tokens) - 1, now)
            if request.logits is not None:
                request.logits += logits[row, : gained[index]].clone()
            if request.finished:
                remember(batch, row, request, self.drafter)
                self.drafter.finish(len(request.reply))
            else:
                going.append(row)
        if going and len(going) < len(self.rows):
            batch.keep(going)
            self.drafter.keep(going)
        self.rows = [self.rows[row] for row in going]
        return gained
