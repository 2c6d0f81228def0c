"""What tasks have in common: replies for items, files that are found, images that are not."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fastvlm.data.tasks import LOADERS
from fastvlm.data.tasks.files import find, locate
from fastvlm.data.tasks.task import Item, check_replies
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import read_json, read_json_lines
from fastvlm.vision.loading import load_image


def test_an_item_opens_its_image() -> None:
    assert Item("a", "?", Path("a.jpg")).open() == Path("a.jpg")
    packed = BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(packed, "PNG")
    image = load_image(Item("b", "?", packed.getvalue()).open())
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), (1, 2, 3))


def test_replies_and_items_must_match() -> None:
    items = [Item("a", "?", Path("a.jpg")), Item("b", "?", Path("b.jpg"))]
    check_replies(items, {"b": "", "a": ""})
    with pytest.raises(InputError, match="1 don't match: 'b' has no reply"):
        check_replies(items, {"a": ""})
    with pytest.raises(InputError, match="2 don't match: 'b' has no reply"):
        check_replies(items, {"a": "", "c": ""})
    with pytest.raises(InputError, match="'c' was never asked"):
        check_replies(items, {"a": "", "b": "", "c": ""})


def test_there_must_be_something_to_score() -> None:
    with pytest.raises(InputError, match="no items to score"):
        check_replies([], {})


@pytest.mark.parametrize("name", LOADERS)
def test_an_empty_folder_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        LOADERS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("coco", "dataset_coco.json"),
        ("nocaps", "nocaps_val_4500_captions.json"),
        ("textvqa", "TextVQA_0.5.1_val.json"),
        ("docvqa", "val_v1.0.json"),
        ("mmvet", "mm-vet.json"),
    ],
)
@pytest.mark.parametrize("content", ["[]", '{"x": {}}', '{"images": [{}], "data": [1]}', "1"])
def test_files_of_another_layout_are_said_to_be(
    name: str, file: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="files are not laid out as published: "):
        LOADERS[name](tmp_path)


def test_files_are_found_here_or_among_the_annotations(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "b.json").touch()
    assert find(tmp_path, "a.json", "b.json") == tmp_path / "annotations" / "b.json"
    (tmp_path / "a.json").touch()
    assert find(tmp_path, "a.json", "b.json") == tmp_path / "a.json"
    with pytest.raises(InputError, match=f"no c.json or d.json in {re.escape(str(tmp_path))}"):
        find(tmp_path, "c.json", "d.json")


def test_files_that_are_no_json_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n\n{"a":\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json can't be read as JSON"):
        read_json(path)
    with pytest.raises(InputError, match=r"Line 3 of .*a\.json"):
        read_json_lines(path)
    path.write_text('{"a": 1}\n\n', encoding="utf-8")
    assert read_json_lines(path) == [{"a": 1}]


def test_the_first_place_that_has_a_image_counts(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place}.jpg").touch()
    found = locate(
        tmp_path,
        {"x": ["one/one.jpg", "two/two.jpg"], "y": ["one/two.jpg", "two/two.jpg"]},
    )
    assert found == {"x": tmp_path / "one" / "one.jpg", "y": tmp_path / "two" / "two.jpg"}


def test_missing_images_are_counted_and_a_few_are_named(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").touch()
    places = {str(number): [f"{number}.jpg", f"val/{number}.jpg"] for number in range(6)}
    with pytest.raises(InputError) as error:
        locate(tmp_path, places)
    assert str(error.value) == (
        f"5 of 6 images are missing in {tmp_path}: 1.jpg, 2.jpg, 3.jpg, ..."
    )
    with pytest.raises(InputError, match=r"1 of 1 images are missing in .*: 1\.jpg$"):
        locate(tmp_path, {"1": places["1"]})
