"""Thousands of requests: sampled replies follow from their seeds, and memory stays flat."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.decoding import Engine, Request, Strategy
from fastvlm.drafting import AdaptiveLength, FixedLength
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import finish, imitation, inputs_of, text_model
from tests.models import IMAGE_SIZE, small_vlm

QUESTION = "Describe the picture."


def ways(vlm: VisionLanguageModel) -> dict[str, Strategy]:
    return {
        "autoregressive": vlm.strategy("autoregressive"),
        "imitation": imitation(vlm.model, length=AdaptiveLength(6)),
        "imitation-mlp": imitation(vlm.model, kind="mlp", length=FixedLength(3)),
        "early-exit": vlm.strategy("early-exit"),
        "layer-skip": vlm.strategy("layer-skip", confidence=0.2),
        "prompt-lookup": vlm.strategy("prompt-lookup"),
        "cascade": vlm.strategy("cascade", network=imitation(vlm.model).network),
    }


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 8])
def test_500_sampled_replies_are_the_same_under_every_strategy(slots: int) -> None:
    vlm = small_vlm()
    images = [render(sample(number), IMAGE_SIZE) for number in range(5)]

    def replies(way: Strategy, slots: int) -> list[list[int]]:
        requests = [
            vlm.request(
                QUESTION,
                images[seed % 5],
                strategy=way,
                temperature=(0.7, 1.0)[seed % 2],
                top_p=(None, 0.9)[seed // 2 % 2],
                seed=seed,
                max_new_tokens=16,
            )
            for seed in range(500)
        ]
        finish(Engine(vlm.decoder, max_slots=slots), requests)
        return [request.output_token_ids for request in requests]

    known = ways(vlm)
    expected = replies(known["autoregressive"], 1)
    assert len({*map(tuple, expected)}) > 400
    for name, way in known.items():
        assert replies(way, slots) == expected, name


def resident() -> int:
    """Return the bytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """10,000 requests one after another, and 200 streams that nobody reads on."""
    model = text_model("qwen2")
    from fastvlm.language import split_decoder

    engine = Engine(split_decoder(model))
    drafting = imitation(model, length=AdaptiveLength(4))
    prompts = [[5, 9, 33, 7], [11, 12, 11], [40, 3, 8, 60, 21, 22, 23, 50, 51], [6]]

    def decode(number: int) -> None:
        for count in range(number):
            inputs = inputs_of(model, prompts[count % 4])
            finish(engine, [Request(inputs, drafting, 2 + count % 3)])

    vlm, image = small_vlm(torch.float32), render(sample(1), IMAGE_SIZE)

    def abandon(number: int) -> None:
        for count in range(number):
            stream: Any = vlm.stream(f"{QUESTION} {count}", image, max_new_tokens=20)
            for _ in range(count % 4):
                next(stream)

    measured: dict[str, list[tuple[int, int]]] = {}
    for name, work, first, number in (
        ("requests", decode, 1000, 2250),
        ("streams", abandon, 40, 40),
    ):
        work(first)
        for _ in range(4):
            work(number)
            gc.collect()
            measured.setdefault(name, []).append((resident(), len(gc.get_objects())))
    for found in measured.values():
        (before, objects), *_, (after, left) = found
        assert after < before + 2**23
        assert left < objects + 300
    assert engine.cache.nbytes == vlm.engine.cache.nbytes == 0
