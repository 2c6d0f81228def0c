"""Images to ask about: every layout has the same records, in the same parts whenever it is read."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.data.conversations import Broken
from fastvlm.data.image_records import ImageRecord
from fastvlm.data.image_sources import ImageSource, find_images
from fastvlm.functional.errors import InputError
from fastvlm.vision.loading import load_image
from tests.data.test_shards import pack

COUNT = 7
PART = 3


def encoded(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def as_files(folder: Path) -> str:
    for number in range(COUNT):
        file = folder / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(number))
    (folder / "notes.md").write_text("no image")
    return str(folder)


def as_lines(folder: Path) -> str:
    as_files(folder)
    lines = [f"{number % 2}/{number}.png" for number in range(COUNT)]
    (folder / "list.txt").write_text("\n\n".join(lines))
    return str(folder / "list.txt")


def as_rows(folder: Path) -> str:
    as_files(folder)
    rows = [{"file_name": f"{number % 2}/{number}.png", "topic": f"topic {number}"}
            for number in range(COUNT)]  # fmt: skip
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "list.jsonl")


def as_shards(folder: Path) -> str:
    for first, last in pairwise([0, 3, 6, COUNT]):
        members = []
        for number in range(first, last):
            members.append((f"{number}.png", encoded(number)))
            members.append((f"{number}.json", json.dumps({"topic": f"topic {number}"}).encode()))
        (folder / f"{first:04}.tar").write_bytes(pack(members))
    return str(folder)


def as_parquet(folder: Path) -> str:
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": encoded(number), "path": None}, "topic": f"topic {number}"}
            for number in range(COUNT)]  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=PART)
    return str(folder / "*.parquet")


def as_data_set(folder: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    features = {"image": datasets.Image(), "topic": datasets.Value("string")}
    rows = {
        "image": [{"bytes": encoded(number), "path": None} for number in range(COUNT)],
        "topic": [f"topic {number}" for number in range(COUNT)],
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(
        folder / "s"
    )
    return str(folder / "s")


def found(source: str, tmp_path: Path) -> ImageSource:
    return find_images(source, tmp_path / "work" / "listing.jsonl", PART)


def reds(source: ImageSource) -> list[list[int]]:
    """Return the red of each image, by parts that were sent to another process."""
    parts = pickle.loads(pickle.dumps(list(source.parts)))
    return [[red(record) for record in part.read()] for part in parts]


def red(record: Any) -> int:
    assert isinstance(record, ImageRecord), record
    value: Any = load_image(record.image).getpixel((0, 0))
    return int(value[0])


@pytest.mark.parametrize("make", [as_lines, as_rows, as_shards, as_parquet, as_data_set])
def test_layouts_have_the_same_records(make: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = found(make(tmp_path / "source"), tmp_path)
    assert reds(source) == [[0, 1, 2], [3, 4, 5], [6]]
    assert source.count == (None if make is as_shards else COUNT)
    if make is not as_lines:
        records = [record for part in source.parts for record in part.read()]
        topics = [record.fields for record in records if isinstance(record, ImageRecord)]
        assert topics == [{"topic": f"topic {number}"} for number in range(COUNT)]


def test_a_folder_keeps_its_order_when_images_are_added(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    source = found(as_files(folder), tmp_path)
    names = [record.name for part in source.parts for record in part.read()]
    assert names == [f"{number % 2}/{number}.png" for number in (0, 2, 4, 6, 1, 3, 5)]
    (folder / "0" / "1.png").write_bytes(encoded(9))
    again = found(str(folder), tmp_path)
    assert again == source


def test_another_list_is_told_from_the_first(tmp_path: Path) -> None:
    file = Path(as_lines(tmp_path))
    before = found(str(file), tmp_path).digest
    file.write_text(file.read_text().replace("0/2.png", "1/1.png"))
    assert found(str(file), tmp_path).digest != before


def test_broken_records_keep_their_places(tmp_path: Path) -> None:
    file = Path(as_rows(tmp_path))
    lines = file.read_text().split("\n")
    lines[1], lines[2], lines[4], lines[5] = "[]", "{", '{"topic": 1}', '{"image": "gone.png"}'
    file.write_text("\n".join(lines))
    records = [record for part in found(str(file), tmp_path).parts for record in part.read()]
    assert [isinstance(record, Broken) for record in records] == [
        False, True, True, False, True, True, False
    ]  # fmt: skip
    assert records[4].name == "record 4 of list.jsonl"
    assert "gone.png" in records[5].reason


def test_the_rest_of_a_damaged_shard_is_a_broken_record(tmp_path: Path) -> None:
    as_shards(tmp_path)
    shard = tmp_path / "0003.tar"
    shard.write_bytes(shard.read_bytes()[:3100])
    records = [list(part.read()) for part in found(str(tmp_path), tmp_path).parts]
    assert [len(part) for part in records] == [3, 2, 1]
    assert isinstance(records[1][-1], Broken)


@pytest.mark.parametrize(
    "name", ["gone", "gone.tar", "gone.parquet", "empty", "a.png", "empty.txt"]
)
def test_what_holds_no_images(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "a.png").write_bytes(encoded(1))
    with pytest.raises(InputError):
        found(str(tmp_path / name), tmp_path)


def test_a_list_of_a_hundred_thousand_is_held_as_places(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("".join(f"folder/{number}.png\n" for number in range(100_000)))
    source = find_images(str(file), tmp_path / "listing", 64)
    assert (len(source.parts), source.count) == (1563, 100_000)
    assert len(pickle.dumps(list(source.parts))) < 100 * len(source.parts)


def test_a_link_back_up_is_not_followed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    (tmp_path / "one" / "up").symlink_to(tmp_path)
    (tmp_path / "one" / "other").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "other").symlink_to(tmp_path / "one")
    find_images(str(tmp_path), tmp_path / "listing.jsonl", 64, "train")
    names = [json.loads(line)["image"] for line in (tmp_path / "listing.jsonl").open()]
    assert names == ["one/0.png", "one/other/0.png", "two/0.png", "two/other/0.png"]
