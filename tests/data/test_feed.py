"""What a run is fed: every record once an epoch, in an order that it can go on in."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import (
    Broken,
    BrokenRecordError,
    Conversation,
    Record,
    Records,
    opened,
)
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import InputError

TURNS = (
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
)


def made(name: str) -> Record:
    return Broken(name, "made so") if name.startswith("broken") else Conversation(name, TURNS)


def records(names: list[str]) -> Records:
    return Records(names, lambda name, _: Conversation(name, TURNS), lambda _, row: row)


@dataclass
class Numbers:
    """Shards of numbered records."""

    sizes: list[int]
    broken: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, shard: int, start: int) -> Iterator[Record]:
        for number in range(start, self.sizes[shard]):
            name = f"{shard}/{number}"
            yield Broken(name, "made so") if name in self.broken else Conversation(name, TURNS)

    def names(self) -> set[str]:
        return {f"{shard}/{n}" for shard, size in enumerate(self.sizes) for n in range(size)}


def names(feed: Feed, count: int) -> list[str]:
    return [conversation.name for conversation in islice(feed, count)]


SOURCES = {
    "records": records([f"0/{n}" for n in range(23)]),
    "shards": Numbers([5, 11, 1, 6]),
    "empty shard": Numbers([12, 0, 11]),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("buffer", [1, 4, 100])
def test_every_record_comes_once_an_epoch(source: Any, buffer: int) -> None:
    fed = names(Feed(source, seed=3, buffer=buffer), 9 * 23)
    epochs = [tuple(fed[start : start + 23]) for start in range(0, len(fed), 23)]
    assert all(len(set(epoch)) == 23 for epoch in epochs)
    assert len(set(epochs)) > 1
    assert fed == names(Feed(source, seed=3, buffer=buffer), 9 * 23)
    assert fed != names(Feed(source, seed=4, buffer=buffer), 9 * 23)


def test_a_large_block_mixes_a_shard() -> None:
    fed = [int(name[2:]) for name in names(Feed(Numbers([200]), buffer=200), 200)]
    away = sum(abs(place - number) for place, number in enumerate(fed)) / 200
    assert 50 < away < 85  # of a uniform permutation of n places it is n / 3


@pytest.mark.parametrize("processes", [2, 3, 4, 7])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_processes_share_an_epoch(source: Any, processes: int) -> None:
    seen: Counter[str] = Counter()
    for process in range(processes):
        feed = Feed(source, seed=1, process=process, processes=processes, buffer=4)
        try:
            for conversation in feed:
                if feed.position.epoch:
                    break
                seen[conversation.name] += 1
        except InputError:
            # With as many processes as shards, one has the empty shard, and it says so.
            assert 0 in getattr(source, "sizes", ())
    assert set(seen.values()) == {1}
    assert len(seen) == 23


@pytest.mark.parametrize(
    ("kind", "processes"),
    [
        ("records", 1),
        ("records", 2),
        ("shards", 1),
        ("shards", 2),
        ("shards", 5),
        ("empty shard", 1),
    ],
)
def test_a_feed_goes_on_exactly_where_it_stopped(kind: str, processes: int) -> None:
    source: Any = SOURCES[kind]
    options: Any = {"seed": 5, "buffer": 4, "process": processes - 1, "processes": processes}
    whole = names(Feed(source, **options), 60)
    for stop in range(50):
        first = Feed(source, **options)
        before = names(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = Feed(source, **options)
        second.load_state_dict(state)
        assert before + names(second, 60 - stop) == whole
        assert second.broken.seen >= 60


def test_broken_records_are_counted_across_a_resumption() -> None:
    source = Numbers([50, 50], frozenset({"0/7", "1/3", "1/40"}))
    feed = Feed(source, buffer=8)
    before = names(feed, 60)
    resumed = Feed(source, buffer=8)
    resumed.load_state_dict(feed.state_dict())
    after = names(resumed, 37)
    assert set(before + after) == source.names() - source.broken
    next(iter(resumed))
    assert resumed.broken.count == 3
    assert {broken.name for broken in resumed.broken.named} == source.broken


def test_the_position_of_another_feed_is_refused() -> None:
    state = Feed(Numbers([5, 5]), seed=1).state_dict()
    for other in (
        Feed(Numbers([5, 5]), seed=2),
        Feed(Numbers([5]), seed=1),
        Feed(Numbers([5, 5]), seed=1, buffer=7),
        Feed(Numbers([5, 5]), seed=1, processes=2),
    ):
        with pytest.raises(InputError, match="The position is one of a feed with"):
            other.load_state_dict(state)


def test_too_many_broken_records_stop_the_run() -> None:
    rows = [f"broken{n}" for n in range(30)] + [f"good{n}" for n in range(270)]
    source = Records(rows, lambda name, _: _raise_or_make(name), lambda _, row: row)
    with pytest.raises(InputError, match=r"broken\d+: made so.*at most 5 %") as stopped:
        names(Feed(source), 270)
    assert str(stopped.value).count("made so") == 5
    feed = Feed(source, broken=BrokenRecords(share=0.2))
    assert len(set(names(feed, 270))) == 270
    names(feed, 1)
    assert feed.broken.summary().startswith("30 of 30")


def _raise_or_make(name: str) -> Conversation:
    if isinstance(found := made(name), Broken):
        raise BrokenRecordError(found.reason)
    return found


def test_a_share_is_judged_on_enough_records_or_at_the_epochs_end() -> None:
    tally = BrokenRecords(share=0.5, least=10)
    for number in range(9):
        tally.see()
        tally.add(Broken(str(number), "made so"))
    tally.see()
    with pytest.raises(InputError, match=r"^10 of 10 records \(100 %\) are broken \(0: made so; "):
        tally.add(Broken("9", "made so"))
    with pytest.raises(InputError, match=r"1 of 3 records \(33.3 %\) are broken \(0/1: made so\)"):
        names(Feed(Numbers([3], frozenset({"0/1"}))), 3)
    with pytest.raises(InputError, match="between 0 and 1; got 5"):
        BrokenRecords(share=5)


def test_an_epoch_without_a_conversation_ends_the_run() -> None:
    feed = Feed(Numbers([2], frozenset({"0/0", "0/1"})), broken=BrokenRecords(share=1))
    with pytest.raises(InputError, match="An epoch had no conversation for process 0 of 1"):
        names(feed, 1)


def test_images_are_opened_or_named(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 6), (255, 0, 0, 255)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.jpg")
    noise = (tmp_path / "noise.jpg").read_bytes()
    (tmp_path / "noise.jpg").write_bytes(noise[: len(noise) // 2])

    def about(image: Any) -> Conversation:
        part = {"type": "image", "image": image}
        return Conversation("it", ({**TURNS[0], "content": [part]}, TURNS[1]))

    found = opened(about(tmp_path / "good.png"))
    assert isinstance(found, Conversation)
    assert found.messages[0]["content"][0]["image"].mode == "RGB"
    assert found.messages[1] == TURNS[1]
    for image in (
        tmp_path / "cut.png",
        tmp_path / "none.png",
        Image.open(tmp_path / "noise.jpg"),
    ):
        broken = opened(about(image))
        assert isinstance(broken, Broken)
        assert broken.reason.startswith("unreadable image: ")


def test_a_blocks_images_are_let_go_when_they_are_used() -> None:
    kept: list[weakref.ref[Image.Image]] = []

    class Images(Numbers):
        def read(self, shard: int, start: int) -> Iterator[Record]:
            for _ in super().read(shard, start):
                image = Image.new("RGB", (4, 3))
                kept.append(weakref.ref(image))
                part = {"type": "image", "image": image}
                yield Conversation("it", ({**TURNS[0], "content": [part]}, TURNS[1]))
                del image, part

    for fed, _ in enumerate(islice(Feed(Images([20])), 19)):
        assert sum(reference() is not None for reference in kept) <= 20 - fed


def test_processes_and_blocks_are_checked() -> None:
    for options in ({"process": 2, "processes": 2}, {"buffer": 0}, {"processes": 24}):
        with pytest.raises(InputError):
            Feed(SOURCES["records"], **options)


def test_reading_ahead_changes_neither_what_is_fed_nor_where_it_stands() -> None:
    broken = frozenset({"0/3", *(f"3/{number}" for number in range(12))})

    def fed(workers: int) -> list[Any]:
        source = Numbers([5, 11, 1, 60], broken)
        feed = Feed(source, seed=2, buffer=4, broken=BrokenRecords(0.15, least=10))
        found: list[Any] = []
        # What is read ahead is known to fail long before it does.
        try:
            for conversation in feed.prepared(opened, workers=workers, ahead=8):
                found += [(conversation.name, feed.state_dict())]
        except InputError as error:
            found += [str(error), feed.state_dict()]
        return found

    assert len(fed(0)) > 10
    assert fed(1) == fed(0)
