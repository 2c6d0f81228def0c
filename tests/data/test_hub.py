"""Hugging Face's `datasets`: saved in a folder, and streamed."""

from __future__ import annotations

import io
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.data import hub
from fastvlm.data.conversations import Broken, Conversation, Records, opened
from fastvlm.data.feed import Feed
from fastvlm.data.image_folders import ImageFolders
from fastvlm.data.reading import read_conversations
from fastvlm.functional.errors import InputError

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")


def encoded(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def captioned(count: int) -> Any:
    rows = {
        "image": [{"bytes": encoded(number), "path": None} for number in range(count)],
        "caption": [f"Number {number}." for number in range(count)],
    }
    rows["image"][1]["bytes"] = b"no image"
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def told(record: Any) -> tuple[int, str]:
    assert isinstance(record, Conversation), record
    found = opened(record)
    assert isinstance(found, Conversation)
    image = found.messages[0]["content"][0]["image"]
    return image.getpixel((0, 0))[0], found.messages[-1]["content"][0]["text"]


def test_a_saved_data_set(tmp_path: Path) -> None:
    captioned(4).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": captioned(3)}).save_to_disk(tmp_path / "splits")
    records = read_conversations(tmp_path / "one")
    assert isinstance(records, Records)
    first, broken, *others = records
    assert [told(record) for record in (first, *others)] == [
        (number, f"Number {number}.") for number in (0, 2, 3)
    ]
    assert isinstance(broken, Broken)
    assert broken.name == "row 1 of one"
    assert broken.reason.startswith("unreadable image")
    assert len(read_conversations(tmp_path / "splits", split="dev")) == 3
    with pytest.raises(InputError, match="no split train; it has dev"):
        read_conversations(tmp_path / "splits")


def test_messages_and_lists_of_images(tmp_path: Path) -> None:
    part = {"type": "text", "text": "Which?"}
    rows = [
        {
            "images": [{"bytes": encoded(number), "path": None} for number in (5, 6)],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}] * 2 + [part]},
                {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
            ],
        }
    ]
    saved = datasets.Dataset.from_list(rows)
    saved = saved.cast_column("images", datasets.List(datasets.Image()))
    saved.save_to_disk(tmp_path)
    [record] = read_conversations(tmp_path)
    assert told(record) == (5, "Both.")
    assert [part["type"] for part in record.messages[0]["content"]] == ["image", "image", "text"]


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"pixels": [1], "label": [0]}).save_to_disk(tmp_path)
    with pytest.raises(InputError, match="has the columns pixels, label; fastvlm looks for"):
        read_conversations(tmp_path)


def test_a_stream_is_fed_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return captioned(24).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shards = read_conversations("owner/name:small", split="dev")
    assert asked == [(("owner/name", "small"), {"split": "dev", "streaming": True})]
    assert isinstance(shards, hub.HubShards)
    assert len(shards) == 3
    [first, broken, *_] = shards.read(0, 0)
    assert told(first) == (0, "Number 0.")
    assert isinstance(broken, Broken)
    assert broken.name == "row 1 of shard 0 of owner/name:small"
    assert told(next(shards.read(1, 2))) == (10, "Number 10.")
    feed = Feed(shards, buffer=4)
    before = [told(conversation)[0] for conversation in islice(feed, 10)]
    resumed = Feed(shards, buffer=4)
    resumed.load_state_dict(feed.state_dict())
    after = [told(conversation)[0] for conversation in islice(resumed, 13)]
    assert sorted(before + after) == [number for number in range(24) if number != 1]


def test_a_name_that_the_hub_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="There is no file or folder owner/none, and it can't be"):
        read_conversations("owner/none")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets: pip install 'fastvlm\[data\]'"):
        hub.stream_from_hub("owner/name", None, "train")


def test_a_streamed_row_may_name_its_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(9))
    rows = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["Nine."]})
    stream = hub.HubShards(rows.to_iterable_dataset(), "it", ImageFolders([tmp_path]))
    assert told(next(stream.read(0, 0))) == (9, "Nine.")
