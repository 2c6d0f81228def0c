"""COCO captions: COCO's own validation sets, and Karpathy's split of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlm.data.tasks.captioning import Captioning, captioning
from fastvlm.data.tasks.files import find, locate
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json, reads

KARPATHY_SPLITS = ("val", "test")
PUBLISHED_SPLITS = ("val2014", "val2017")


@reads("COCO's files")
def coco(folder: Path, split: str = "test") -> Captioning:
    """Read COCO captions (Chen et al. 2015, arXiv 1504.00325).

    Args:
        folder: Holds `dataset_coco.json` for Karpathy's splits, or `captions_val2014.json` or
            `captions_val2017.json`, here or in `annotations/`, and the images in folders that
            are named as COCO's (`val2014/`) or in `images/`.
        split: `test` or `val` of Karpathy's (5,000 images each, what papers report), or
            `val2014` or `val2017`.

    Raises:
        InputError: There is no such split, a file is missing or empty, or images are missing.
    """
    if split in KARPATHY_SPLITS:
        path = find(folder, "dataset_coco.json")
        images = [image for image in read_json(path)["images"] if image["split"] == split]
        places = {
            str(image["cocoid"]): (
                f"{image['filepath']}/{image['filename']}",
                f"images/{image['filename']}",
            )
            for image in images
        }
        references = {
            str(image["cocoid"]): [sentence["raw"] for sentence in image["sentences"]]
            for image in images
        }
    elif split in PUBLISHED_SPLITS:
        path = find(folder, f"captions_{split}.json")
        content = read_json(path)
        references = captions_by_image(content)
        places = {
            str(image["id"]): (f"{split}/{image['file_name']}", f"images/{image['file_name']}")
            for image in content["images"]
            if str(image["id"]) in references
        }
    else:
        raise InputError(
            f"COCO has no split {split!r}; take one of {(*KARPATHY_SPLITS, *PUBLISHED_SPLITS)}."
        )
    if not places:
        raise InputError(f"{path} has no captioned image of the split {split!r}.")
    return captioning(f"COCO {split}", locate(folder, places), references)


def captions_by_image(content: Any) -> dict[str, list[str]]:
    """Return the captions in a file of COCO's layout, by the id of their image."""
    captions: dict[str, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return captions
