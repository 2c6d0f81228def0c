"""Captions as prose, and photos in Flickr8k's layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlm.data.captioned import CaptionedImage, decode, read_flickr8k, tidy, typical_first
from fastvlm.functional.errors import InputError

LINES = (
    "b.jpg\tTwo dogs play .",
    "a.jpg\tA child in a pink dress , on stairs .",
    "b.jpg\ta dog runs",
    "b.jpg\t .",
    "c.jpg\tA man 's hat .",
)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("A child climbs .", "A child climbs."),
        ("two dogs run", "Two dogs run."),
        ("A dog , a cat and a bird .", "A dog, a cat and a bird."),
        ("The dog 's toy .", "The dog's toy."),
        ("A man . A dog .", "A man. A dog."),
        ('A sign says " Stop " .', "A sign says Stop."),
        ("  spread \t out  .  ", "Spread out."),
        ("It ends twice . .", "It ends twice."),
        ("It ends...", "It ends."),
        ("Hurrah !", "Hurrah."),
        ("it ends , .", "It ends."),
        ("élan .", "Élan."),
        ("McDonald 's in NYC .", "McDonald's in NYC."),
    ],
)
def test_a_caption_becomes_prose(caption: str, text: str) -> None:
    assert tidy(caption) == text
    assert tidy(text) == text


@pytest.mark.parametrize("caption", ["", " ", ".", " . . ", '" "', "...", ", !"])
def test_an_empty_caption_stays_empty(caption: str) -> None:
    assert tidy(caption) == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "captions.tsv").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("b.jpg\na.jpg\n")
    (tmp_path / "test.txt").write_text("c.jpg\n")
    return tmp_path


def test_a_split_is_read_in_its_order(folder: Path) -> None:
    assert read_flickr8k(folder, "train") == [
        CaptionedImage(folder / "images" / "b.jpg", ("Two dogs play.", "A dog runs.")),
        CaptionedImage(
            folder / "images" / "a.jpg", ("A child in a pink dress, on stairs.",)
        ),
    ]  # fmt: skip
    [photo] = read_flickr8k(folder, "test")
    assert photo.captions == ("A man's hat.",)


@pytest.mark.parametrize("name", ["captions.tsv", "train.txt"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    message = f"{re.escape(str(folder))} is not laid out like Flickr8k: {re.escape(name)}"
    with pytest.raises(InputError, match=message):
        read_flickr8k(folder, "train")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not laid out like Flickr8k"):
        read_flickr8k(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("line", ["", "d.jpg\t .\n"])
def test_a_photo_without_a_caption_is_named(line: str, folder: Path) -> None:
    with (folder / "captions.tsv").open("a") as table:
        table.write(line)
    (folder / "train.txt").write_text("a.jpg\nd.jpg\n")
    with pytest.raises(InputError, match=r"d\.jpg, listed in train\.txt, has no caption"):
        read_flickr8k(folder, "train")


def test_photos_are_decoded_into_one_tensor(tmp_path: Path) -> None:
    red, grey = Image.new("RGB", (9, 5), (200, 0, 10)), Image.new("L", (3, 8), 77)
    red.save(tmp_path / "red.png")
    grey.save(tmp_path / "grey.png")
    pixels = decode([CaptionedImage(tmp_path / f"{n}.png", ()) for n in ("red", "grey")], 4)
    assert (pixels.shape, pixels.dtype) == ((2, 3, 4, 4), torch.uint8)
    assert pixels[0].flatten(1).unique(dim=1).flatten().tolist() == [200, 0, 10]
    assert pixels[1].unique().tolist() == [77]


def test_the_caption_that_agrees_most_with_the_others_comes_first() -> None:
    photos = [
        CaptionedImage(
            Path("a.jpg"),
            ("Sun shines.", "A dog.", "A brown dog runs in the snow.", "A brown dog in snow."),
        ),
        CaptionedImage(Path("b.jpg"), ("A child.", "A child plays.")),
        CaptionedImage(Path("c.jpg"), ("A child sleeps.",)),
    ]
    first, second, third = typical_first(photos)
    assert set(first.captions) == set(photos[0].captions)
    assert first.captions[0] == "A brown dog in snow."
    assert first.captions[-1] == "Sun shines."
    assert second == photos[1]
    assert third == photos[2]
