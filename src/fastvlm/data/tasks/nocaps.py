"""nocaps: captions of things that COCO's captions never name (Agrawal et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from fastvlm.data.tasks.captioning import Captioning, captioning
from fastvlm.data.tasks.coco import captions_by_image
from fastvlm.data.tasks.files import find, locate
from fastvlm.functional.text_files import read_json, reads


@reads("nocaps' files")
def nocaps(folder: Path) -> Captioning:
    """Read nocaps' validation set: 4,500 images with ten captions, in three domains.

    Args:
        folder: Holds `nocaps_val_4500_captions.json`, here or in `annotations/`, and the images
            in `val/` or `images/`.

    Raises:
        InputError: The file or images are missing.
    """
    content = read_json(find(folder, "nocaps_val_4500_captions.json"))
    places = {
        str(image["id"]): (f"val/{image['file_name']}", f"images/{image['file_name']}")
        for image in content["images"]
    }
    domains = {str(image["id"]): image["domain"] for image in content["images"]}
    return captioning("nocaps", locate(folder, places), captions_by_image(content), domains)
