"""Captioning as a task: one caption an image, against several human ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fastvlm.data.tasks.task import CAPTION_PROMPT, Item, check_replies
from fastvlm.metrics.captions import score_captions


@dataclass(frozen=True, slots=True)
class Captioning:
    """A captioning task.

    Attributes:
        name: The benchmark's name in a table.
        items: The images.
        references: Human captions, by item; `fastvlm.metrics.java` takes them too.
        domains: By item, a part of the images that is scored apart as well; may be empty.
    """

    name: str
    items: Sequence[Item]
    references: Mapping[str, Sequence[str]]
    domains: Mapping[str, str] = field(default_factory=dict)
    judged: ClassVar[bool] = False

    def score(self, replies: Mapping[str, str]) -> dict[str, float]:
        """Return `BLEU-1` to `BLEU-4`, `ROUGE-L` (0 to 1) and `CIDEr` (0 to 10).

        CIDEr is also given for each domain alone, as `CIDEr in-domain`.

        Raises:
            InputError: An item has no reply, or a reply no item.
        """
        check_replies(self.items, replies)
        asked = [item.id for item in self.items]
        scores = score_captions(replies, {item: self.references[item] for item in asked})
        named = {f"BLEU-{order}": score for order, score in enumerate(scores.bleu, 1)}
        named |= {"ROUGE-L": scores.rouge_l, "CIDEr": scores.cider}
        members: dict[str, list[str]] = {}
        for item in asked:
            if item in self.domains:
                members.setdefault(self.domains[item], []).append(item)
        for domain, its in members.items():
            # Alone, as the weights of CIDEr's n-grams depend on which images are scored.
            alone = score_captions(
                {item: replies[item] for item in its}, {item: self.references[item] for item in its}
            )
            named[f"CIDEr {domain}"] = alone.cider
        return named


def captioning(
    name: str,
    images: Mapping[str, Path],
    references: Mapping[str, Sequence[str]],
    domains: Mapping[str, str] | None = None,
) -> Captioning:
    """Return a captioning task.

    Args:
        name: The benchmark's name in a table.
        images: The images' paths, by item.
        references: Human captions, by item.
        domains: The part of the benchmark that each item belongs to; None for no parts.
    """
    items = tuple(Item(image, CAPTION_PROMPT, path) for image, path in images.items())
    return Captioning(name, items, references, domains or {})
