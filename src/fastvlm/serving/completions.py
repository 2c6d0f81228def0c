"""`/v1/completions`: prompts without a chat template, answered whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from openai.types.completion_choice import CompletionChoice, Logprobs
from pydantic import Field

from fastvlm.decoding.reply import Reply
from fastvlm.decoding.request import TokenLogprob
from fastvlm.decoding.text import ReplyText
from fastvlm.functional.messages import Prompt, TokenPrompt
from fastvlm.serving.engine_thread import EngineThread
from fastvlm.serving.errors import ApiError
from fastvlm.serving.protocol import ChoicesRequest
from fastvlm.serving.replies import ChoiceReplies, Part
from fastvlm.serving.settings import ServerSettings
from fastvlm.serving.tokenization import TokenId, decode, encode

Tokens = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(ChoicesRequest):
    """The body of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=5, strict=True)] | None = None
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        """Refuse what this server doesn't support. See `Sampling.check`."""
        super().check()
        if self.best_of not in (None, self.n):
            raise ApiError("best_of is not supported, unless it is n.", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(
                "The log-probabilities of a prompt are not supported: give echo or logprobs.",
                param="echo",
            )

    @property
    def most_tokens(self) -> int:
        """The most tokens of a reply."""
        return self.max_tokens

    @property
    def most_likely(self) -> int | None:
        """The number of most likely tokens that are told of; None for no log-probabilities."""
        return self.logprobs

    @property
    def texts_or_tokens(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        # One prompt of tokens, or several prompts.
        several: list[Any] = self.prompt
        return [several] if isinstance(several[0], int) else several


class CompletionReplies(ChoiceReplies[CompletionRequest]):
    """The replies to prompts without a chat template."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self, asked: CompletionRequest, name: str, engine: EngineThread, settings: ServerSettings
    ) -> None:
        super().__init__(asked, name, engine, settings)
        self.echoes: list[str] = []
        """The text that is repeated before each prompt's replies."""
        self._texts: dict[int, ReplyText] = {}
        """The text of each choice so far, which tells where its tokens stand in it."""

    @property
    def prompt_count(self) -> int:
        """The number of prompts."""
        return len(self.asked.texts_or_tokens)

    async def prompts(self) -> Sequence[Prompt]:
        """Return the prompts' tokens. See `Replies.prompts`."""
        return await asyncio.to_thread(self._prompts)

    def _prompts(self) -> list[TokenPrompt]:
        tokenizer, special = self.vlm.tokenizer, self.asked.add_special_tokens
        given = self.asked.texts_or_tokens
        for one in given:
            if isinstance(one, str):
                self.engine.check_length(one)
        self.echoes = [
            one if isinstance(one, str) else decode(tokenizer, one, "prompt")
            for one in (given if self.asked.echo else [])
        ]
        return [
            TokenPrompt(encode(tokenizer, one, special) if isinstance(one, str) else one)
            for one in given
        ]

    def echo(self, index: int) -> str:
        """Return the text that is repeated before a choice's reply."""
        return self.echoes[index // self.per_prompt] if self.asked.echo else ""

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """Return a choice that is finished."""
        return CompletionChoice(
            index=index,
            finish_reason=self.finish_reason(index),
            text=self.echo(index) + reply.text,
            logprobs=self.logprobs(index, reply.logprobs),
        ).model_dump(mode="json", exclude_unset=True)

    def first_change(self, index: int) -> dict[str, Any] | None:
        """Return the prompt's text, where the request asks for it."""
        return {"text": self.echo(index), "logprobs": None} if self.asked.echo else None

    def changes(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a piece, or its end, brings of a choice of a stream."""
        if part.piece is None:
            reason = self.finish_reason(part.index)
            yield {"text": "", "logprobs": None, "finish_reason": reason}
            return
        logprobs = self.logprobs(part.index, self.known_logprobs(part))
        yield {
            "text": part.piece.text,
            "logprobs": None if logprobs is None else logprobs.model_dump(mode="json"),
            **self.drafted(part),
        }

    def logprobs(self, index: int, known: Sequence[TokenLogprob] | None) -> Logprobs | None:
        """Return the log-probabilities of a choice's next tokens; None without any."""
        if known is None:
            return None
        text = self._texts.setdefault(index, ReplyText(self.vlm.tokenizer))
        offsets = []
        for one in known:
            offsets.append(len(text.whole))
            text.follow([*text.token_ids, one.token_id])
        return Logprobs(
            text_offset=offsets,
            token_logprobs=[one.logprob for one in known],
            tokens=[self.token_text(one.token_id) for one in known],
            top_logprobs=[self.top_logprobs(one) for one in known],
        )

    def top_logprobs(self, known: TokenLogprob) -> dict[str, float]:
        """Return the most likely tokens at a position and the chosen one, by their texts."""
        found: dict[str, float] = {}
        for token_id, logprob in {**known.top, known.token_id: known.logprob}.items():
            text = self.token_text(token_id)
            # Parts of characters have the same text: the likeliest of them stands for them.
            found[text] = max(logprob, found.get(text, logprob))
        return found
