"""A request's reply: as a whole, or in pieces as it is decoded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from fastvlm.decoding.engine import Engine
from fastvlm.decoding.request import FinishReason, Request, TokenLogprob
from fastvlm.functional.statistics import DecodingStatistics


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply as it streams.

    Args:
        text: Text that is final; never part of a character.
        token_ids: The tokens of the text.
        drafted: Whether each token was drafted and accepted.
    """

    text: str
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """Return pieces that follow each other as one."""
        return cls(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.token_ids),
            tuple(one for piece in pieces for one in piece.drafted),
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, whole or so far.

    Args:
        text: The text, without special tokens; all pieces of a stream together.
        token_ids: The tokens, the end token included.
        drafted: Whether each token was drafted and accepted.
        prompt_token_ids: The prompt's tokens, a placeholder for each visual token.
        finish_reason: `stop` for an end token or a stop string, `length` for the token limit,
            `cancelled`, or `error`; None while it goes on.
        error: A sentence on what went wrong, where the reason is `error`.
        logprobs: The log-probability of each token, if requested.
        statistics: Timings and acceptance.
    """

    text: str
    token_ids: list[int]
    drafted: list[bool]
    prompt_token_ids: list[int]
    finish_reason: FinishReason | None
    error: str | None
    logprobs: list[TokenLogprob] | None
    statistics: DecodingStatistics

    @classmethod
    def of(cls, request: Request, tokenizer: PreTrainedTokenizerBase) -> Reply:
        """Return what a request has decoded so far."""
        text = request.new_text(tokenizer)
        text.follow(request.output_token_ids)
        if request.finished:
            text.end()
        return cls(
            text.final,
            list(request.output_token_ids),
            list(request.drafted),
            list(request.prompt_token_ids),
            request.finish_reason,
            None if request.error is None else str(request.error),
            None if request.logprobs is None else list(request.token_logprobs),
            request.statistics,
        )


class ReplyStream:
    """A reply that is being decoded: an iterator over its pieces.

    It has a state: whoever stops iterating and starts again continues where it stopped, and a
    finished one yields nothing more. Its request waits for a slot from the first piece on; `close`,
    the end of a `with` block, or garbage collection frees the slot. One thread at a time may
    iterate over a stream.

    Args:
        engine: The engine that decodes it.
        request: The request.
        tokenizer: The model's tokenizer.
    """

    def __init__(
        self, engine: Engine, request: Request, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.engine, self.request, self.tokenizer = engine, request, tokenizer
        self._text = request.new_text(tokenizer)
        self._shown = self._taken = 0
        """Characters and tokens that pieces have shown."""
        self._pieces: deque[Piece] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._cancel = weakref.finalize(self, engine.cancel, request)

    def __iter__(self) -> ReplyStream:
        """Return the stream itself."""
        return self

    def __next__(self) -> Piece:
        """Return the next piece: text that has become final, or at the end whatever is left.

        Raises:
            StopIteration: The reply has ended.
            Exception: The request failed with this error.
        """
        while not self._pieces:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopIteration
            self.start()
            while not self._arrived():
                self.engine.step(unless=self._arrived)
            self._receive()
        return self._pieces.popleft()

    def start(self) -> None:
        """Let the request wait for a slot, if it doesn't yet."""
        if not self.request.added:
            self.engine.add(self.request)

    def ready(self) -> list[Piece]:
        """Return the pieces that have come, without making a step; none, once it has ended.

        For callers who make the steps themselves, as a server's thread does.

        Raises:
            Exception: The request failed with this error, and its last pieces have been returned.
        """
        if not self._ended:
            self._receive()
        if not self._pieces and self._error is not None:
            error, self._error = self._error, None
            raise error
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    @property
    def ended(self) -> bool:
        """Whether all pieces have been returned, and no more will come."""
        return self._ended and not self._pieces and self._error is None

    def _receive(self) -> None:
        """Make pieces of what has come since."""
        request = self.request
        # The reason first: what it ends has all its tokens by then.
        finished = request.finished
        self._take(request.output_token_ids[:], finished)
        if finished:
            self._ended, self._error = True, request.error
            self._cancel.detach()

    def __enter__(self) -> ReplyStream:
        """Return the stream itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the reply where it stands; nothing more is computed or yielded."""
        self._cancel()
        self._pieces.clear()
        self._ended = True

    @property
    def reply(self) -> Reply:
        """The whole reply; what is decoded so far, while the stream goes on."""
        return Reply.of(self.request, self.tokenizer)

    def _arrived(self) -> bool:
        """Return whether there is something that no piece has shown, or ever will be."""
        known = len(self._text.token_ids)
        return len(self.request.output_token_ids) > known or self.request.finished

    def _take(self, token_ids: list[int], finished: bool) -> None:
        """Make pieces of the tokens that have come."""
        text = self._text
        for end in range(len(text.token_ids) + 1, len(token_ids) + 1):
            text.follow(token_ids[:end])
            if len(text.final) > self._shown and end < len(token_ids):
                self._show(token_ids, end)
        if finished:
            text.end()
        if len(text.final) > self._shown or (finished and self._taken < len(token_ids)):
            self._show(token_ids, len(token_ids))

    def _show(self, token_ids: list[int], end: int) -> None:
        shown = slice(self._taken, end)
        final = self._text.final
        self._pieces.append(
            Piece(final[self._shown :], tuple(token_ids[shown]), tuple(self.request.drafted[shown]))
        )
        self._shown, self._taken = len(final), end
