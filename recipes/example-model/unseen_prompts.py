"""Whether a draft holds for prompts that it has not seen: its acceptance on them and on known ones.

Drafts have four tokens each, so that no rule for their length hides a poor one. Run `python
recipes/example-model/unseen_prompts.py FLICKR8K [--draft DIR]`; the figures stand in the model's
card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastvlm
import fastvlm_example
from fastvlm.data.captioned import read_flickr8k
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from recipe.wordings import CANONICAL, HELD_OUT

DRAFT_TOKENS = 4
MAX_NEW_TOKENS = 100


def acceptance(vlm: VisionLanguageModel, prompts: Sequence[str], images: Sequence[Any]) -> float:
    """Return the share of the drafted tokens that are accepted, of replies about all images."""
    strategy = vlm.strategy("imitation", num_speculative_tokens=DRAFT_TOKENS, confidence=0.0)
    asked = [(prompt, image) for prompt in prompts for image in images]
    requests = vlm.engine.run_all(
        vlm.requests(*zip(*asked, strict=True), strategy=strategy, max_new_tokens=MAX_NEW_TOKENS)
    )
    accepted = sum(sum(request.accepted) for request in requests)
    return accepted / sum(sum(request.proposed) for request in requests)


def main() -> None:
    """Print the acceptance for each kind of request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="captioned ones, in Flickr8k's layout")
    parser.add_argument("--draft", type=Path, default=fastvlm_example.DRAFT)
    parser.add_argument("--limit", type=int, default=100, help="photos, and scenes")
    given = parser.parse_args()
    photos = [one.path for one in read_flickr8k(given.photos, "dev")[: given.limit]]
    first = fastvlm_example.HELD_OUT_SCENES
    vlm = fastvlm.load(fastvlm_example.MODEL, given.draft, prefix_bytes=0, max_slots=1)
    scenes = [render(sample(first + n), vlm.image_size) for n in range(given.limit)]
    for kind, prompt in CANONICAL.items():
        images: Sequence[Any] = scenes if kind == "scene" else photos
        known, unseen = (acceptance(vlm, some, images) for some in ([prompt], HELD_OUT[kind]))
        print(f"{kind}: known {known:.1%}, {len(HELD_OUT[kind])} unseen {unseen:.1%}")  # noqa: T201


if __name__ == "__main__":
    main()
