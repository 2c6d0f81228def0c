"""What a draft learns from: questions, and a target's own replies or the data set's.

Own replies are decoded by our engine and kept on disk, a line each, so that a killed run goes on
from the last one, and another run with the same options decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import Broken, Record
from fastvlm.data.journal import append_line, whole_lines
from fastvlm.decoding import Request
from fastvlm.drafting.fingerprint import weights_hash
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import locked
from fastvlm.functional.messages import Message
from fastvlm.vlm import VisionLanguageModel

REPORTED = 48
"""Replies after each of which the progress is said."""


@dataclass(frozen=True, slots=True)
class TrainingPrompt:
    """A dialogue up to a question, and what the data set says to it.

    Args:
        name: What names it in errors.
        messages: The dialogue, the last turn the user's.
        said: The data set's reply; "" where it has none.
    """

    name: str
    messages: tuple[Message, ...]
    said: str


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue up to a question, and the reply that is learnt.

    Args:
        messages: The dialogue, the last turn the user's.
        reply: The reply's tokens, with its end token where it has ended.
    """

    messages: tuple[Message, ...]
    reply: tuple[int, ...]


def questions_of(
    records: Iterable[Record],
    broken: BrokenRecords,
    *,
    prompts: Sequence[str] = (),
    limit: int | None = None,
) -> list[TrainingPrompt]:
    """Return the questions of conversations, each assistant's turn being a reply to one.

    Args:
        records: The conversations.
        broken: What counts the records that are passed over.
        prompts: What is asked of each conversation's first image instead; an image that comes
            again is then asked about once.
        limit: The most questions.

    Raises:
        InputError: Too many records are broken.
    """
    found: list[TrainingPrompt] = []
    shown: set[str] = set()
    for record in records:
        if limit is not None and len(found) >= limit:
            break
        broken.see()
        if isinstance(record, Broken):
            broken.add(record)
        elif prompts:
            images = [part for turn in record.messages for part in images_of(turn)]
            if images and (place := place_of(images[0]) or record.name) not in shown:
                shown.add(place)
                found += [
                    TrainingPrompt(record.name, (_user([images[0], _text(prompt)]),), "")
                    for prompt in prompts
                ]
        else:
            found += [
                TrainingPrompt(record.name, record.messages[:place], text_of(turn))
                for place, turn in enumerate(record.messages)
                if turn["role"] == "assistant"
            ] or [TrainingPrompt(record.name, record.messages, "")]
    broken.check()
    return found[:limit]


def images_of(message: Message) -> list[Any]:
    """Return the images among a turn's parts."""
    return [part for part in message["content"] if part["type"] == "image"]


def text_of(message: Message) -> str:
    """Return the text of a turn."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def place_of(part: Mapping[str, Any]) -> str:
    """Return where an image lies; "" for one that is in memory."""
    image = part["image"]
    return str(image) if isinstance(image, str | Path) else ""


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _user(parts: list[Any]) -> Message:
    return {"role": "user", "content": parts}


def data_replies(vlm: VisionLanguageModel, asked: Sequence[TrainingPrompt]) -> list[Example]:
    """Return the data set's replies as tokens, each with the model's end token.

    Raises:
        InputError: The model has no end token, or there is a prompt without a reply.
    """
    for question in asked:
        if not question.said:
            raise InputError(f"The data has no reply to learn to {question.name}.")
    end = end_token(vlm.tokenizer, vlm.end_tokens)
    return [
        Example(
            question.messages,
            (*vlm.tokenizer.encode(question.said, add_special_tokens=False), end),
        )
        for question in asked
    ]


def end_token(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> int:
    """Return the token that ends a reply to be learnt: the tokenizer's own, if it is one.

    Args:
        tokenizer: The model's.
        ends: The tokens at which the model's replies end.

    Raises:
        InputError: There is none.
    """
    if not ends:
        raise InputError("The model has no end token, so it can't learn where a reply ends.")
    usual = tokenizer.eos_token_id
    return usual if usual in ends else min(ends)


def own_replies(
    vlm: VisionLanguageModel,
    asked: Sequence[TrainingPrompt],
    cache: Path,
    broken: BrokenRecords,
    *,
    max_new_tokens: int = 160,
    temperature: float = 0.0,
) -> list[Example]:
    """Return the target's replies, from the cache where it has answered before.

    The cache's name is made of the target's weights, the questions and the options.

    Args:
        vlm: The target; its own best strategy decodes.
        asked: The questions.
        cache: The folder of the cache.
        broken: What counts the questions that can't be asked, whose images can't be read or that
            leave no room for a reply; they are passed over.
        max_new_tokens: The most tokens of a reply.
        temperature: Of sampled replies, each drawn with its question's number as the seed; 0 for
            greedy ones.

    Raises:
        InputError: Too many questions can't be asked, or another run writes to the folder.
        StorageError: The disk is full.
    """
    plan = [weights_hash(vlm.model), max_new_tokens, temperature, [_named(one) for one in asked]]
    key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    file = cache / f"replies-{key}.jsonl"
    with locked(cache):
        rows = whole_lines(file)
        started, first = time.monotonic(), len(rows)
        for row in answers(vlm, asked, first, max_new_tokens, temperature):
            append_line(file, row)
            rows.append(row)
            if not len(rows) % REPORTED or len(rows) == len(asked):
                left = (time.monotonic() - started) / (len(rows) - first) * (len(asked) - len(rows))
                print(  # noqa: T201
                    f"replies {len(rows)}/{len(asked)}  {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
    examples = []
    for one, row in zip(asked, rows, strict=True):
        broken.see()
        if isinstance(row, str):
            broken.add(Broken(one.name, row))
        else:
            examples.append(Example(one.messages, tuple(row)))
    broken.check()
    return examples


def answers(
    vlm: VisionLanguageModel,
    asked: Sequence[TrainingPrompt],
    first: int,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[list[int] | str]:
    """Yield the tokens of the replies to questions, or why one can't be asked, in their order.

    Args:
        vlm: The target.
        asked: The questions.
        first: The number of the first question to answer.
        max_new_tokens: The most tokens of a reply.
        temperature: See `own_replies`.

    Raises:
        Exception: A reply failed for another reason than its question.
    """
    prompts = [one.messages for one in asked[first:]]
    sampling: dict[str, Any] = {"temperature": temperature, "seed": first} if temperature else {}
    made = vlm.requests(prompts, [None] * len(prompts), max_new_tokens=max_new_tokens, **sampling)
    waiting: deque[Request] = deque()

    def in_order() -> Iterator[Request]:
        for request in made:
            waiting.append(request)
            yield request

    for _ in vlm.engine.run(in_order()):
        while waiting and waiting[0].finished:
            request = waiting.popleft()
            if request.error is None:
                yield request.output_token_ids
            elif isinstance(request.error, InputError):
                yield str(request.error)
            else:
                raise request.error


def _identity(part: Mapping[str, Any]) -> list[Any]:
    place = place_of(part)
    # A file that was exchanged for another of the same name is another image.
    return [place, Path(place).stat().st_size if place and Path(place).is_file() else None]


def _named(asked: TrainingPrompt) -> list[Any]:
    """Return what tells a question from others: its name, texts and images."""
    return [
        asked.name,
        [
            [turn["role"], text_of(turn), [_identity(part) for part in images_of(turn)]]
            for turn in asked.messages
        ],
    ]
