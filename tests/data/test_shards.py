"""Shards of tar files: what a record is, which files a pattern means, and what damage costs."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from fastvlm.data.conversations import Broken, Conversation, opened
from fastvlm.data.feed import Feed
from fastvlm.data.reading import read_conversations
from fastvlm.data.shards import TarShards, expand_braces
from fastvlm.functional.errors import InputError


def encoded(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def pack(members: list[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, held in members:
            info = tarfile.TarInfo(name)
            info.size = len(held)
            tar.addfile(info, io.BytesIO(held))
    return data.getvalue()


def captioned(first: int, last: int) -> bytes:
    return pack(
        [
            member
            for number in range(first, last)
            for member in (
                (f"{number:05}.png", encoded(number)),
                (f"{number:05}.txt", f"Number {number}.".encode()),
            )
        ]
    )


def told(record: Any) -> tuple[int, str]:
    """Return the red of a record's image, and its reply."""
    assert isinstance(record, Conversation), record
    found = opened(record)
    assert isinstance(found, Conversation)
    image = found.messages[0]["content"][0]["image"]
    return image.getpixel((0, 0))[0], found.messages[-1]["content"][0]["text"]


def test_a_record_is_the_members_of_one_name(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]
    shard = tmp_path / "a.tar"
    shard.write_bytes(
        pack(
            [
                ("one/x.PNG", encoded(1)),
                ("one/x.json", json.dumps({"url": "u", "status": "success"}).encode()),
                ("one/x.txt", b" One. "),
                ("two/x.0.png", encoded(2)),
                ("two/x.1.png", encoded(3)),
                ("two/x.json", json.dumps({"conversations": turns, "image": "y.jpg"}).encode()),
                ("three.png", encoded(4)),
                ("four.txt", b"Four."),
                ("five.jpg", b"no image"),
                ("five.txt", b"Five."),
                ("six.png", encoded(6)),
                ("six.json", b"{"),
                (".hidden", b""),
                ("seven.v2.png", encoded(7)),
                ("seven.txt", b"Seven."),
            ]
        )
    )
    [shards, folder] = [read_conversations(source) for source in (shard, tmp_path)]
    assert shards == folder
    assert isinstance(shards, TarShards)
    one, two, *broken, seven = shards.read(0, 0)
    assert told(one) == (1, "One.")
    assert told(two) == (2, "Both.")
    assert told(seven) == (7, "Seven.")
    assert isinstance(two, Conversation)
    assert [part["type"] for part in two.messages[0]["content"]] == [
        "image",
        "text",
        "image",
        "text",
    ]
    assert [(record.name, re.split("[:,]", record.reason)[0]) for record in broken] == [
        ("three of a.tar", "none of messages"),
        ("four of a.tar", "missing image"),
        ("five of a.tar", "unreadable image"),
        ("six of a.tar", "malformed turn"),
    ]
    assert [record.name for record in shards.read(0, 5)] == ["six of a.tar", "seven of a.tar"]
    assert not list(shards.read(0, 7))


def test_shards_on_disk_and_elsewhere_are_fed_and_resumed(tmp_path: Path) -> None:
    for number in range(3):
        data = captioned(10 * number, 10 * number + 10)
        (tmp_path / f"part-{number:03}.tar").write_bytes(data)
        with fsspec.open(f"memory://shards/part-{number:03}.tar", "wb") as file:
            file.write(data)
    feeds = []
    for source in (
        tmp_path,
        f"{tmp_path}/part-*.tar",
        f"{tmp_path}/part-{{000..002}}.tar",
        "memory://shards/part-*.tar",
        "memory://shards/part-{000..002}.tar",
    ):
        shards = read_conversations(source)
        assert len(shards) == 3
        feed = Feed(shards, buffer=4)
        feeds.append([told(conversation) for conversation in islice(feed, 17)])
        resumed = Feed(shards, buffer=4)
        resumed.load_state_dict(feed.state_dict())
        feeds[-1] += [told(conversation) for conversation in islice(resumed, 13)]
    assert sorted(feeds[0]) == [(number, f"Number {number}.") for number in range(30)]
    assert all(fed == feeds[0] for fed in feeds)


def ten_records(ending: str, folder: Path) -> bytes:
    """Return a shard of ten records, the same bytes at each call."""
    whole = folder / f"whole{ending}"
    mode: Any = "w:gz" if ending.endswith("gz") else "w"
    noise = random.Random(1)
    with tarfile.open(whole, mode) as tar:
        for number in range(10):
            for name, held in ((f"{number}.png", noise.randbytes(4096)), (f"{number}.txt", b"A.")):
                info = tarfile.TarInfo(name)
                info.size = len(held)
                tar.addfile(info, io.BytesIO(held))
    return whole.read_bytes()


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_cut_shard_costs_its_rest(ending: str, tmp_path: Path) -> None:
    whole = ten_records(ending, tmp_path)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    found = list(TarShards([str(cut)]).read(0, 0))
    assert 3 < len(found) < 9
    last = found[-1]
    assert isinstance(last, Broken)
    assert (last.name, last.reason.split(":")[0]) == (str(cut), "damaged shard")


def test_no_cut_of_a_shard_is_silent(tmp_path: Path) -> None:
    whole = ten_records(".tar", tmp_path)
    cut = tmp_path / "cut.tar"
    records = 10 * (512 + 4096 + 512 + 512)
    # In a header, between members, between a record's members, in the data, and before the end.
    for size in (*range(256, records + 1, 2816), records - 512):
        cut.write_bytes(whole[:size])
        *sound, last = TarShards([str(cut)]).read(0, 0)
        assert isinstance(last, Broken), size
        # What was begun may be all there, or not.
        assert len(sound) in (size // 5632, max(0, size // 5632 - 1)), size


def test_a_header_that_is_overwritten_is_no_end(tmp_path: Path) -> None:
    whole = bytearray(ten_records(".tar", tmp_path))
    whole[3 * 5632 : 3 * 5632 + 512] = b"x" * 512
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole)
    *_, last = TarShards([str(cut)]).read(0, 0)
    assert isinstance(last, Broken)


def test_shards_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").write_bytes(captioned(0, 1))
    with pytest.raises(InputError, match=r"no shard at .*a-1\.tar"):
        read_conversations(f"{tmp_path}/a-{{0..2}}.tar")
    with pytest.raises(InputError, match=r"no shard at .*b-\*\.tar"):
        read_conversations(f"{tmp_path}/b-*.tar")
    with pytest.raises(InputError, match=r"no shard at memory://none/\*\.tar"):
        read_conversations("memory://none/*.tar")
    with pytest.raises(InputError, match=r"The shard memory://none/a\.tar can't be read"):
        next(iter(Feed(read_conversations("memory://none/a.tar"))))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{008..010}", ["008", "009", "010"]),
        ("{2..1}", ["2", "1"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a}{,b}", ["{a}", "{a}b"]),
    ],
)
def test_braces_mean_what_they_mean_to_a_shell(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names
