"""Flickr8k: photos with five captions each (Hodosh et al. 2013)."""

from __future__ import annotations

from pathlib import Path

from fastvlm.data.tasks.captioning import Captioning, captioning
from fastvlm.data.tasks.files import find, locate
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_text


def flickr8k(folder: Path, split: str = "test") -> Captioning:
    """Read a split of Flickr8k; its captions are the references as people wrote them.

    Args:
        folder: Holds `Flickr8k.token.txt`, `Flickr_8k.testImages.txt` and the photos in
            `Flicker8k_Dataset/` (so spelt), or `captions.tsv`, `test.txt` and `images/`.
        split: `train`, `dev` or `test`.

    Raises:
        InputError: A file or images are missing, or a photo has no caption.
    """
    listing = find(folder, f"Flickr_8k.{split}Images.txt", f"{split}.txt")
    table = find(folder, "Flickr8k.token.txt", "captions.tsv")
    captions: dict[str, list[str]] = {}
    for line in read_text(table).splitlines():
        name, _, caption = line.partition("\t")
        # The publisher numbers the captions: 1000268201_693b08cb0e.jpg#0
        captions.setdefault(name.partition("#")[0], []).append(caption.strip())
    names = read_text(listing).split()
    if bare := [name for name in names if name not in captions]:
        raise InputError(
            f"{len(bare)} of {len(names)} photos of {listing.name} have no caption in"
            f" {table.name}, the first of them {bare[0]}."
        )
    places = {name: (f"Flicker8k_Dataset/{name}", f"images/{name}") for name in names}
    return captioning(
        f"Flickr8k {split}", locate(folder, places), {name: captions[name] for name in names}
    )
