"""The cycle: draft, verify, accept, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvlm.decoding.prefix import Prefix
from fastvlm.decoding.selection import Selection
from fastvlm.decoding.strategies import Batch, Draft, Drafter
from fastvlm.decoding.text import ReplyText
from fastvlm.functional.acceptance import accept_greedy
from fastvlm.functional.errors import InputError
from fastvlm.language.decoder import SplitDecoder


@dataclass(slots=True)
class Request:
    """One reply to decode, and in the end what was decoded and how.

    Args:
        tokens: The prompt's tokens, a placeholder for each visual token.
        embeddings: The prompt's embeddings, the picture's in their places: (length, d_embedding).
        max_new_tokens: The most tokens of the reply.
        end_tokens: Tokens that end a reply.
        prefix: Where keys and values of the prompt's beginning are found or kept.
        started: When its work began (`time.perf_counter`), for the time to first token.
        selection: How its tokens are chosen.
        stops: Asked after each token whether the reply, of which it is the last, ends there.
        text: The reply's text, whose stop strings end the reply.
        logits: Where the target's logits of each token are kept, (vocabulary,); None for nowhere.
        positions: Time, height and width of the prompt's positions, (3, length), for a model that
            tells them apart; None for 0, 1, 2 ...
        memory: The encoder's states of the source, (source, d_model), for an encoder-decoder.
    """

    tokens: list[int]
    embeddings: Tensor
    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    prefix: Prefix | None = None
    started: float = field(default_factory=time.perf_counter)
    selection: Selection = field(default_factory=Selection)
    stops: Callable[[list[int]], bool] | None = None
    text: ReplyText | None = None
    logits: list[Tensor] | None = None
    positions: Tensor | None = None
    memory: Tensor | None = None
    reply: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    """Whether each token of the reply was drafted and accepted."""
    times: list[float] = field(default_factory=list)
    """When each token of the reply was known."""
    proposed: list[int] = field(default_factory=list)
    """Drafted tokens of each cycle."""
    accepted: list[int] = field(default_factory=list)
    """Accepted tokens of each cycle."""
    finished: bool = False

    def take(self, tokens: Sequence[int], accepted: int, now: float) -> int:
        """Add a cycle's tokens, cut where the reply ends; return how many stayed."""
        for index, token in enumerate(tokens):
            self.reply.append(token)
            self.drafted.append(index < accepted)
            self.times.append(now)
            if (
                token in self.end_tokens
                or len(self.reply) >= self.max_new_tokens
                or (self.stops is not None and self.stops(self.reply))
                or (self.text is not None and self.text.stop and self.text.follow(self.reply))
            ):
                self.finished = True
                return index + 1
        return len(tokens)


class Decoding:
    """Decodes a batch of requests with one strategy.

    Rows accept different numbers of tokens, each with its own length in the cache; those that have
    finished leave the batch.

    Args:
        decoder: The target.
        drafter: The strategy.
        requests: The rows.

    Raises:
        InputError: A prompt doesn't fit into the model's context, or the limit is below 1.
    """

    def __init__(
        self, decoder: SplitDecoder, drafter: Drafter, requests: Sequence[Request]
    ) -> None:
        self.decoder, self.drafter, self.requests = decoder, drafter, list(requests)
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
        capacity = max(len(r.tokens) + r.max_new_tokens for r in self.requests) + drafter.margin
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
        lengths = [len(request.tokens) for request in self.requests]
        cache, exit_layer = self.batch.cache, self.drafter.exit_layer
        starts = self.restore()
        longest = max(length - start for length, start in zip(lengths, starts, strict=True))
        x = torch.zeros(
            len(lengths),
            longest,
            self.requests[0].embeddings.shape[-1],
            dtype=self.decoder.dtype,
            device=self.decoder.device,
        )
        for row, request in enumerate(self.requests):
            x[row, : lengths[row] - starts[row]] = request.embeddings[starts[row] :]
        span = cache.span(starts, longest)
        x = self.decoder.run(x, span, cache, range(exit_layer))
        cache.lengths = lengths
        if exit_layer:
            self.drafter.observe(x, span, self.batch)
        x = self.decoder.run(x, span, cache, range(exit_layer, self.decoder.depth))
        self.remember()
        last = torch.tensor(lengths, device=x.device) - torch.tensor(starts, device=x.device) - 1
        logits = self.decoder.head(x[torch.arange(len(x), device=x.device), last][:, None])
        self.batch.vocabulary_size = logits.shape[-1]
        chosen = self.accept(Draft([[] for _ in lengths]), logits)
        return self.commit(chosen, logits)

    def restore(self) -> list[int]:
        """Fill the cache with what is kept of the prompts; return how many positions of each."""
        cache, owner = self.batch.cache, self.drafter.cache_owner
        found = [
            None if request.prefix is None else request.prefix.find(owner, self.decoder.depth)
            for request in self.requests
        ]
        starts = [0 if state is None else state.shape[3] for state in found]
        rest = max(len(r.tokens) - s for r, s in zip(self.requests, starts, strict=True))
        if max(starts) + rest > cache.capacity:
            # A long prompt beside one whose beginning is kept: all are computed from the start.
            return [0] * len(starts)
        for row, state in enumerate(found):
            if state is not None:
                cache.restore(row, state)
        return starts

    def remember(self) -> None:
        """Keep what the cache holds of the prompts' beginnings, where it is not kept yet."""
        owner = self.drafter.cache_owner
        for row, request in enumerate(self.requests):
            prefix = request.prefix
            if prefix is not None and prefix.find(owner, self.decoder.depth) is None:
                prefix.remember(owner, self.batch.cache.read(row, len(prefix.tokens)))

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
        if hidden is not None:
            self.drafter.commit(hidden, [len(tokens) - 1 for tokens in chosen])
        proposed = [len(tokens) for tokens in draft.tokens]
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
        if self.batch.plain:
            found = [
                accept_greedy(tokens, best)
                for tokens, best in zip(draft.tokens, logits.argmax(-1).tolist(), strict=True)
            ]
        else:
            q = draft.q or [[None] * len(tokens) for tokens in draft.tokens]
            found = [
                selection.accept(self.batch.replies[row], draft.tokens[row], q[row], logits[row])
                for row, selection in enumerate(self.batch.selections)
            ]
        return [
            [*tokens[:count], following]
            for tokens, (count, following) in zip(draft.tokens, found, strict=True)
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
        width = 1 + max(len(tokens) for tokens in draft.tokens)
        known = 0 if draft.hidden is None else draft.hidden.shape[1]
        inputs = [
            ([last, *tokens] + [last] * width)[known:width]
            for last, tokens in zip(self.batch.last, draft.tokens, strict=True)
        ]
        x = decoder.embed(torch.tensor(inputs, device=decoder.device))
        if exit_layer:
            rest = cache.span([length + known for length in cache.lengths], width - known)
            x = decoder.run(x, rest, cache, range(exit_layer))
            if draft.hidden is not None:
                x = torch.cat((draft.hidden, x), 1)
        hidden = x if exit_layer else None
        span = cache.span(cache.lengths, width)
        x = decoder.run(x, span, cache, range(exit_layer, decoder.depth))
        return decoder.head(x), hidden

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
            if not request.finished:
                going.append(row)
        if going and len(going) < len(self.rows):
            batch.keep(going)
            self.drafter.keep(going)
        self.rows = [self.rows[row] for row in going]
        return gained
