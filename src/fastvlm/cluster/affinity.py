"""Which replica a request goes to: the one that has its image or its conversation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

MAX_KEY_CHARACTERS = 1024
"""Characters of a text prompt that tell it from others: what most of a conversation begins with."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request is to go; it is the first argument of a call to a replica.

    Args:
        key: What it shares with others, see `affinity_key`; "" for nothing.
        replica: The replica that it is for; "" for any.
    """

    key: str = ""
    replica: str = ""


class RunningReplicas:
    """The replicas that run, as this process's router knows them."""

    names: ClassVar[tuple[str, ...]] = ()


def affinity_key(body: bytes) -> str:
    """Return what requests have in common that should meet on one replica.

    It is the first image, as a later question about an image repeats it; without one it is how the
    conversation begins, up to the user's first turn.

    Args:
        body: A request's body.

    Returns:
        A digest; "" for a body that has neither.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, Mapping):
        return ""
    turns = asked.get("messages", asked.get("input"))
    image = next(_images(turns), None) if isinstance(turns, list) else None
    found = image or _opening(turns) or _text(asked.get("prompt"))
    return hashlib.sha256(found.encode("utf-8", "backslashreplace")).hexdigest() if found else ""


def _images(turns: Sequence[Any]) -> Iterator[str]:
    """Yield the images of a dialogue, as the URLs that they came as."""
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else []:
            shown = part.get("image_url") if isinstance(part, Mapping) else None
            url = shown.get("url") if isinstance(shown, Mapping) else shown
            if isinstance(url, str):
                yield url


def _opening(turns: Any) -> str:
    """Return a dialogue up to the user's first turn, as text."""
    if isinstance(turns, str):
        return turns[:MAX_KEY_CHARACTERS]
    opening = []
    for turn in turns if isinstance(turns, list) else []:
        opening.append(turn)
        if isinstance(turn, Mapping) and turn.get("role") == "user":
            break
    return json.dumps(opening, sort_keys=True) if opening else ""


def _text(prompt: Any) -> str:
    """Return how a prompt of `/v1/completions` begins, as text."""
    if isinstance(prompt, str):
        return prompt[:MAX_KEY_CHARACTERS]
    return json.dumps(prompt)[:MAX_KEY_CHARACTERS] if isinstance(prompt, list) and prompt else ""


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """Return replicas in the order in which a key prefers them.

    Each pair of a key and a replica has a weight of its own, and the heaviest comes first (Thaler
    and Ravishankar 1998). So only the keys of a replica that is gone go elsewhere, each to another
    one, and a replica that is new takes its share of all the others.

    Args:
        key: What `affinity_key` returned.
        replicas: The replicas' names.
    """

    def weight(replica: str) -> bytes:
        return hashlib.sha256(f"{key}/{replica}".encode()).digest()

    return sorted(replicas, key=weight, reverse=True)
