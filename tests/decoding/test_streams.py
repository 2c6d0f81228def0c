"""Streams are iterators with a state, and strategies hold none."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest

from fastvlm.decoding import Strategy
from fastvlm.drafting import FixedLength
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import imitation
from tests.models import IMAGE_SIZE, small_vlm

QUESTION = "Describe the picture."


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm()


@pytest.fixture(scope="module")
def image() -> Any:
    return render(sample(3), IMAGE_SIZE)


@pytest.fixture(scope="module")
def drafting(vlm: VisionLanguageModel) -> Strategy:
    return imitation(vlm.model, perfect=True, exit_layer=2, length=FixedLength(4))


@pytest.fixture
def whole(vlm: VisionLanguageModel, image: Any) -> list[int]:
    return vlm.generate(QUESTION, image, max_new_tokens=30).token_ids


def test_a_stream_goes_on_where_it_stood(
    vlm: VisionLanguageModel, image: Any, drafting: Strategy, whole: list[int]
) -> None:
    stream = vlm.stream(QUESTION, image, max_new_tokens=30, strategy=drafting)
    before = stream.reply
    assert (before.text, before.token_ids, before.finish_reason) == ("", [], None)
    assert math.isnan(before.statistics.ttft_ms)
    first = next(iter(stream))
    pieces = [first]
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 3:
            break
    so_far = stream.reply
    assert so_far.token_ids == whole[: len(so_far.token_ids)]
    assert so_far.finish_reason is None
    pieces += list(stream)
    assert [token for piece in pieces for token in piece.token_ids] == whole
    assert "".join(piece.text for piece in pieces) == stream.reply.text
    assert list(stream) == []
    assert next(stream, None) is None
    assert stream.reply.token_ids == whole
    assert stream.reply.finish_reason == "length"


def test_what_is_closed_or_forgotten_frees_its_slot(
    vlm: VisionLanguageModel, image: Any, whole: list[int]
) -> None:
    stream = vlm.stream(QUESTION, image, max_new_tokens=30)
    next(stream)
    assert len(vlm.engine.slots) == 1
    stream.close()
    assert not vlm.engine.slots
    assert list(stream) == []
    assert stream.reply.finish_reason == "cancelled"
    assert stream.reply.token_ids == whole[: len(stream.reply.token_ids)]
    stream.close()
    with vlm.stream(QUESTION, image, max_new_tokens=30) as stream:
        next(stream)
    assert not vlm.engine.slots
    stream = vlm.stream(QUESTION, image, max_new_tokens=30)
    next(stream)
    del stream
    assert not vlm.engine.slots
    assert vlm.engine.cache.nbytes == 0


def test_abandoned_and_waiting_streams_hold_no_cache(vlm: VisionLanguageModel, image: Any) -> None:
    def abandon(number: int) -> None:
        for count in range(number):
            stream = vlm.stream(QUESTION, image, max_new_tokens=30)
            for _ in range(count % 3):
                next(stream)

    abandon(10)
    gc.collect()
    objects = len(gc.get_objects())
    abandon(60)
    gc.collect()
    assert len(gc.get_objects()) < objects + 200
    # Those that nobody reads yet have no slot, and those that wait for one have no memory.
    waiting = [vlm.stream(QUESTION, image, max_new_tokens=30) for _ in range(40)]
    assert not vlm.engine.slots
    assert vlm.engine.cache.nbytes == 0
    for stream in waiting:
        vlm.engine.add(stream.request)
    vlm.engine.step()
    assert len(vlm.engine.slots) == vlm.engine.max_slots
    assert vlm.engine.cache.slots == vlm.engine.max_slots
    del waiting, stream
    gc.collect()
    assert not vlm.engine.slots
    assert not vlm.engine.waiting
    assert vlm.engine.cache.nbytes == 0


def test_interleaved_streams_of_one_strategy(vlm: VisionLanguageModel, drafting: Strategy) -> None:
    images = [render(sample(number), IMAGE_SIZE) for number in range(3)]
    options = {"max_new_tokens": 30, "strategy": drafting}
    alone = [vlm.generate(QUESTION, image, **options) for image in images]
    streams = [vlm.stream(QUESTION, image, **options) for image in images]
    going = list(streams)
    while going:
        going = [stream for stream in going if next(stream, None) is not None]
    for stream, expected in zip(streams, alone, strict=True):
        assert stream.reply.token_ids == expected.token_ids
        # What the strategy proposes for one doesn't suffer from the others.
        assert stream.reply.statistics.acceptance_rate == 1.0
        assert stream.reply.statistics.accepted >= expected.statistics.accepted - 4


def test_batches_of_different_sizes_of_one_strategy(
    vlm: VisionLanguageModel, drafting: Strategy
) -> None:
    images = [render(sample(number), IMAGE_SIZE) for number in range(5)]
    expected = [vlm.generate(QUESTION, image, max_new_tokens=12).token_ids for image in images]
    for size in (5, 2, 4, 1):
        found = vlm.generate_batch(
            [QUESTION] * size, images[:size], max_new_tokens=12, strategy=drafting
        )
        assert [reply.token_ids for reply in found] == expected[:size]


def test_an_error_of_a_stream_is_raised_where_it_is_read(
    vlm: VisionLanguageModel, image: Any
) -> None:
    def stops(*_: Any) -> bool:
        raise RuntimeError("enough")

    stream = vlm.stream(QUESTION, image, max_new_tokens=30)
    stream.request.stops = stops
    with pytest.raises(RuntimeError, match="enough"):
        list(stream)
    assert stream.reply.finish_reason == "error"
    assert stream.reply.error == "enough"
    assert list(stream) == []
    assert not vlm.engine.slots
