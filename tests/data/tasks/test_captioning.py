"""Captioning tasks: COCO in both layouts, nocaps by domain, Flickr8k."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm.data.tasks import coco, flickr8k, nocaps
from fastvlm.functional.errors import InputError
from fastvlm.metrics.captions import score_captions
from tests.data.tasks.published import write_images, write_json

PROMPT = "Provide a one-sentence caption for the provided image."
CAPTIONS = {"7": ["A red bird sits.", "a bird"], "3": ["Two boats.", "Boats at sea, two."]}
REPLIES = {"7": "A red bird.", "3": "Two boats at sea."}


def annotations() -> list[dict[str, Any]]:
    return [
        {"image_id": int(image), "id": number, "caption": caption}
        for image, captions in CAPTIONS.items()
        for number, caption in enumerate(captions)
    ]


def test_karpathys_split(tmp_path: Path) -> None:
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{int(image):012}.jpg",
            "split": split,
            "cocoid": int(image),
            "sentences": [{"raw": caption} for caption in captions],
        }
        for (image, captions), split in zip(
            [*CAPTIONS.items(), ("9", ["A dog."])], ["test", "test", "restval"], strict=True
        )
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": images})
    write_images(tmp_path / "val2014", [image["filename"] for image in images[:2]])
    task = coco(tmp_path, "test")
    assert [(item.id, item.prompt, item.image) for item in task.items] == [
        ("7", PROMPT, tmp_path / "val2014" / "COCO_val2014_000000000007.jpg"),
        ("3", PROMPT, tmp_path / "val2014" / "COCO_val2014_000000000003.jpg"),
    ]
    direct = score_captions(REPLIES, CAPTIONS)
    scores = task.score(REPLIES)
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert tuple(scores.values()) == (*direct.bleu, direct.rouge_l, direct.cider)
    with pytest.raises(InputError, match="no captioned image of the split 'val'"):
        coco(tmp_path, "val")


def test_cocos_own_file(tmp_path: Path) -> None:
    images = [{"id": int(image), "file_name": f"{image}.jpg"} for image in (*CAPTIONS, "99")]
    content = {"images": images, "annotations": annotations()}
    write_json(tmp_path / "annotations" / "captions_val2014.json", content)
    write_images(tmp_path / "images", ["7.jpg", "3.jpg"])
    task = coco(tmp_path, "val2014")
    assert task.references == CAPTIONS  # an image without captions is no item
    assert [item.image for item in task.items] == [
        tmp_path / "images" / "7.jpg",
        tmp_path / "images" / "3.jpg",
    ]
    with pytest.raises(InputError, match="COCO has no split 'train'"):
        coco(tmp_path, "train")
    with pytest.raises(InputError, match=r"There is no captions_val2017\.json"):
        coco(tmp_path, "val2017")


def test_nocaps_scores_each_domain_alone(tmp_path: Path) -> None:
    captions = {**CAPTIONS, "4": ["A cat sleeps.", "one cat"]}
    domains = {"7": "in-domain", "3": "in-domain", "4": "out-domain"}
    content = {
        "images": [
            {"id": int(image), "file_name": f"{image}.jpg", "domain": domain}
            for image, domain in domains.items()
        ],
        "annotations": [
            {"image_id": int(image), "caption": caption}
            for image, texts in captions.items()
            for caption in texts
        ],
    }
    write_json(tmp_path / "nocaps_val_4500_captions.json", content)
    write_images(tmp_path / "val", [f"{image}.jpg" for image in captions])
    task = nocaps(tmp_path)
    replies = {**REPLIES, "4": "A cat."}
    scores = task.score(replies)
    assert scores["CIDEr"] == score_captions(replies, captions).cider
    assert scores["CIDEr in-domain"] == score_captions(REPLIES, CAPTIONS).cider
    assert scores["CIDEr in-domain"] != scores["CIDEr"]
    assert scores["CIDEr out-domain"] == 0  # of a single image
    part = replace(task, items=task.items[:2]).score(REPLIES)
    assert part["CIDEr"] == part["CIDEr in-domain"]
    assert "CIDEr out-domain" not in part


@pytest.mark.parametrize(
    ("table", "listing", "place", "number"),
    [
        ("Flickr8k.token.txt", "Flickr_8k.devImages.txt", "Flicker8k_Dataset", "#0"),
        ("captions.tsv", "dev.txt", "images", ""),
    ],
)
def test_flickr8k(tmp_path: Path, table: str, listing: str, place: str, number: str) -> None:
    lines = f"a.jpg{number}\tA dog .\nb.jpg{number}\tA cat on 3rd St .\n"
    (tmp_path / table).write_text(lines, encoding="utf-8")
    (tmp_path / listing).write_text("b.jpg\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"1 of 1 images are missing in .*/b\.jpg$"):
        flickr8k(tmp_path, "dev")
    write_images(tmp_path / place, ["b.jpg"])
    task = flickr8k(tmp_path, "dev")
    assert [(item.id, item.prompt, item.image) for item in task.items] == [
        ("b.jpg", PROMPT, tmp_path / place / "b.jpg")
    ]
    assert task.references == {"b.jpg": ["A cat on 3rd St ."]}
    assert task.score({"b.jpg": "a cat on 3rd st"})["BLEU-1"] == pytest.approx(1)
    (tmp_path / listing).write_text("b.jpg\nc.jpg\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"1 of 2 photos .* the first of them c\.jpg"):
        flickr8k(tmp_path, "dev")


# Published files and figures, which aren't part of the project.


def test_real_coco(data: Path, tmp_path: Path) -> None:
    folder = data / "coco_val2017_subset"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    (tmp_path / "captions_val2017.json").symlink_to(folder / "captions.json")
    (tmp_path / "images").symlink_to(folder / "images")
    task = coco(tmp_path, "val2017")
    assert len(task.items) == 76
    assert sum(map(len, task.references.values())) == 380
    first = {item.id: task.references[item.id][0] for item in task.items}
    assert task.score(first)["BLEU-4"] == pytest.approx(1)


def test_real_flickr8k(data: Path) -> None:
    folder = data / "flickr8k"
    if not folder.is_dir():
        pytest.skip(f"No folder {folder}.")
    task = flickr8k(folder, "dev")
    assert len(task.items) == 1000
    assert {len(texts) for texts in task.references.values()} == {5}
    assert all(isinstance(item.image, Path) and item.image.is_file() for item in task.items)


@pytest.mark.slow
def test_published_nocaps(data: Path, tmp_path: Path) -> None:
    file = data / "scored_captions" / "viecap_nocaps.json.gz"
    if not file.is_file():
        pytest.skip(f"No file {file}.")
    rows = json.loads(gzip.decompress(file.read_bytes()))
    content = {
        "images": [
            {"id": number, "file_name": row["image_name"], "domain": row["split"]}
            for number, row in enumerate(rows)
        ],
        "annotations": [
            {"image_id": number, "caption": caption}
            for number, row in enumerate(rows)
            for caption in row["captions"]
        ],
    }
    write_json(tmp_path / "nocaps_val_4500_captions.json", content)
    write_images(tmp_path / "val", [row["image_name"] for row in rows])
    scores = nocaps(tmp_path).score({str(n): row["prediction"] for n, row in enumerate(rows)})
    published = {"in_domain": 0.611, "near_domain": 0.643, "out_domain": 0.650}
    for domain, cider in published.items():
        assert scores[f"CIDEr {domain}"] == pytest.approx(cider, abs=5e-4)
    assert scores["CIDEr"] == pytest.approx(0.662, abs=5e-4)
