"""The turns of a conversation, from a row as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastvlm.data.conversations import BrokenRecordError, Conversation
from fastvlm.data.image_folders import ImageFolders
from fastvlm.functional.messages import Message
from fastvlm.vision.loading import ImageInput

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
"""LLaVA-1.5's prompt for a caption of one sentence."""
SHORT_ANSWER_PROMPT = "Answer the question using a single word or phrase."
"""LLaVA-1.5's request for a short answer, on a line of its own after a question of VQA v2."""
IMAGE_PLACEHOLDER = "<image>"
ROLE_BY_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
CAPTION_KEYS = ("caption", "text", "captions")
CONTENT_KEYS = ("messages", "conversations", "prompt", "question", *CAPTION_KEYS)
"""Keys of supported rows; the first one in a row decides its format."""


def is_known(row: Any) -> bool:
    """Return whether `conversation_of` supports a row's format."""
    return isinstance(row, Mapping) and any(row.get(key) is not None for key in CONTENT_KEYS)


def conversation_of(name: str, row: Any, folders: ImageFolders) -> Conversation:
    """Return the conversation of a row.

    Args:
        name: The record's name, for error messages.
        row: A row with `messages` (`role`, `content`), `conversations` (LLaVA's `from`, `value`),
            `prompt` (text alone, kept as it is) and perhaps its `completion`, `question` and its
            `answers` or `answer`, or a `caption` (`text`), or several `captions`, each of which is
            learnt. Its images are `image` or `images`, one or a list.
        folders: Where to look for its images.

    Raises:
        BrokenRecordError: The row has none of these, an image is missing, a turn is malformed, or
            there is no reply.
    """
    if not is_known(row):
        raise BrokenRecordError(f"none of {', '.join(CONTENT_KEYS)} in it")
    shown = row.get("image") if row.get("image") is not None else row.get("images")
    several = isinstance(shown, Sequence) and not isinstance(shown, str | bytes)
    values = [] if shown is None else list(shown) if several else [shown]
    key = next(key for key in CONTENT_KEYS if row.get(key) is not None)
    if key == "prompt":
        if values:
            raise BrokenRecordError("malformed record: a prompt is text alone; there is an image")
        return Conversation(name, _prompt(row["prompt"], row.get("completion")))
    if not values and key not in ("messages", "conversations"):
        raise BrokenRecordError(f"missing image: there is a {key} and no image")
    # The text is judged first: no file is looked for on behalf of a record that is broken anyway.
    captions = _captions(row[key]) if key in CAPTION_KEYS else []
    return Conversation(name, _messages(_turns(row, key), values, folders), tuple(captions[1:]))


Turn = tuple[str, list[Any]]
"""A role, and its texts and images in their order: `None` for an image that the row gives apart
from its turns, `{"image": ...}` for one of the turn's own."""


def _turns(row: Mapping[str, Any], key: str) -> list[Turn]:
    if key in ("messages", "conversations"):
        turns = row[key]
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise BrokenRecordError(f"malformed turn: {key} is no list")
        return [_turn(turn) for turn in turns]
    if key == "question":
        return _question(row)
    return [("user", [CAPTION_PROMPT]), ("assistant", _captions(row[key])[:1])]


def _captions(value: Any) -> list[str]:
    """Return the captions of a row, one or several."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [_text(caption, "reply") for caption in (value or [None] if several else [value])]


def _prompt(prompt: Any, completion: Any) -> tuple[Message, ...]:
    """Return a prompt, and what follows it where that is given.

    Nothing is stripped: to a model that goes on with a text, the spaces at its end matter.
    """
    turns = [("user", "prompt", prompt)]
    turns += [] if completion is None else [("assistant", "reply", completion)]
    for _, what, text in turns:
        _text(text, what)
    return tuple(
        {"role": role, "content": [{"type": "text", "text": text}]} for role, _, text in turns
    )


def _question(row: Mapping[str, Any]) -> list[Turn]:
    """Return a question and its answer; of several people's answers the most frequent."""
    question, answers = _text(row["question"], "question"), row.get("answers")
    if answers is None:
        return [("user", [question]), ("assistant", [_text(row.get("answer"), "reply")])]
    said = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    counts = Counter(text.strip() for text in said if isinstance(text, str) and text.strip())
    if not counts:
        raise BrokenRecordError("no reply: none of its answers is a text")
    [(answer, _)] = counts.most_common(1)
    return [("user", [f"{question}\n{SHORT_ANSWER_PROMPT}"]), ("assistant", [answer])]


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise BrokenRecordError(f"malformed turn: {repr(turn)[:60]} is no object")
    said = turn.get("role", turn.get("from"))
    role = ROLE_BY_SPEAKER.get(said) if isinstance(said, str) else None
    if role is None:
        raise BrokenRecordError(f"malformed turn: its role is {repr(said)[:40]}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        return role, _split(content)
    if not isinstance(content, Sequence):
        raise BrokenRecordError("malformed turn: it has neither text nor parts")
    parts: list[Any] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                parts += [text] if text.strip() else []
            case {"type": "image"}:
                parts.append({"image": part.get("image")} if part.get("image") else None)
            case _:
                raise BrokenRecordError(
                    f"malformed turn: {repr(part)[:60]} is neither text nor image"
                )
    return role, parts


def _split(text: str) -> list[Any]:
    """Return a text's pieces with its placeholders between them.

    A turn's only image comes first, as LLaVA itself shows it; several stay where they stand.
    """
    pieces: list[Any] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        pieces += [None] if index else []
        pieces += [piece.strip()] if piece.strip() else []
    if pieces.count(None) == 1:
        pieces.sort(key=lambda piece: piece is not None)
    return pieces


def _messages(turns: list[Turn], values: list[Any], folders: ImageFolders) -> tuple[Message, ...]:
    """Return checked turns with the images in their places."""
    # ShareGPT's conversations, which LLaVA took over, are cut anywhere: a reply to nothing at the
    # start and a question without a reply at the end are no part of what can be learnt.
    system = turns[:1] if turns and turns[0][0] == "system" else []
    turns = turns[len(system) :]
    while turns and turns[0][0] == "assistant":
        turns = turns[1:]
    while turns and turns[-1][0] == "user":
        turns = turns[:-1]
    if not turns:
        raise BrokenRecordError("no reply: there is no user's turn with an assistant's after it")
    for index, (role, parts) in enumerate(turns):
        if role != ("user", "assistant")[index % 2]:
            raise BrokenRecordError(f"malformed turn: turn {index + 1} is again the {role}'s")
        if role == "assistant" and not parts:
            raise BrokenRecordError(f"no reply: turn {index + 1} is empty")
    for role, parts in [*system, *turns]:
        if role != "user" and not all(isinstance(part, str) for part in parts):
            raise BrokenRecordError(f"malformed turn: an image in the {role}'s")
    shown = [part for _, parts in turns for part in parts if not isinstance(part, str)]
    if values and not shown:
        role, parts = turns[0]
        turns = [(role, [*[None] * len(values), *parts]), *turns[1:]]
    elif shown.count(None) != len(values):
        reason = "missing image" if shown.count(None) > len(values) else "malformed turn"
        raise BrokenRecordError(
            f"{reason}: places for {shown.count(None)}, and {len(values)} given"
        )
    remaining = iter(values)
    return tuple(
        {
            "role": role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": _shown(part, remaining, folders)}
                for part in parts
            ],
        }
        for role, parts in [*system, *turns]
    )


def _shown(part: Any, remaining: Iterator[Any], folders: ImageFolders) -> ImageInput:
    return folders.image(next(remaining) if part is None else part["image"])


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecordError(f"no {what}: {repr(value)[:40]} stands in its place")
    return value.strip()
