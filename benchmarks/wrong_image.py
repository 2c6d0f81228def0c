"""Whether the model that ships looks: its loss on captions with the right and a wrong image.

Run `python benchmarks/wrong_image.py FLICKR8K`; the figures stand in the model's card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastvlm
from fastvlm.data.captioned import read_flickr8k
from fastvlm.evaluation.quality import caption_losses


def main() -> None:
    """Print the two losses per token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="captioned ones, in Flickr8k's layout")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int, default=1000)
    given = parser.parse_args()
    shown = read_flickr8k(given.photos, given.split)[: given.limit]
    losses = caption_losses(fastvlm.load(prefix_bytes=0), shown)
    print(f"right image {losses['right']:.3f}, another one {losses['wrong']:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
