"""Many threads, one model: ours in all of them, and transformers' own beside them."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvlm
from fastvlm.vlm import VisionLanguageModel
from tests.families import replies
from tests.processors import asked, sample_image, saved

QUESTIONS = ("What?", "Who is it?", "Where is A?")
LIMIT = 10


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "blip2-opt", "blip2-t5"])
def test_replies_are_right_in_every_thread(family: str, tmp_path: Path) -> None:
    _, processor = saved(family, tmp_path)
    vlm = fastvlm.load(tmp_path, dtype=torch.float64)
    inputs = [asked(processor, [text], [sample_image(n)]) for n, text in enumerate(QUESTIONS)]
    expected = [replies(vlm.model, given, LIMIT)[0] for given in inputs]
    state = {name: list(vars(part)) for name, part in vlm.model.named_modules()}

    def ours(seed: int) -> list[bool]:
        chance = random.Random(seed)
        found = []
        for _ in range(8):
            number = chance.randrange(3)
            strategy = chance.choice(("autoregressive", "early-exit", "prompt-lookup"))
            if chance.random() < 0.3:
                stream = vlm.stream(
                    QUESTIONS[number], sample_image(number), strategy=strategy, max_new_tokens=LIMIT
                )
                tokens = [token for piece in stream for token in piece.token_ids]
            else:
                reply = vlm.generate(
                    QUESTIONS[number], sample_image(number), strategy=strategy, max_new_tokens=LIMIT
                )
                tokens = reply.token_ids
            found.append(tokens == expected[number])
        return found

    def theirs() -> list[bool]:
        # One thread of it: Qwen2.5-VL's own generate keeps its offsets on the model.
        return [replies(vlm.model, inputs[n % 3], LIMIT)[0] == expected[n % 3] for n in range(12)]

    with ThreadPoolExecutor(5) as pool:
        beside = pool.submit(theirs)
        assert [all(found) for found in pool.map(ours, range(4))] == [True] * 4
        assert all(beside.result())
    assert {name: list(vars(part)) for name, part in vlm.model.named_modules()} == state
    assert not vlm.engine.slots
    assert vlm.engine.cache.nbytes == 0


def test_requests_of_threads_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm.decoding import engine
    from tests.models import small_vlm

    vlm: VisionLanguageModel = small_vlm()
    sizes: list[int] = []
    ordinary, ready = engine.cycle, threading.Barrier(4)

    def noted(batch: Any, strategy: Any) -> None:
        sizes.append(len(batch.slots))
        ordinary(batch, strategy)

    monkeypatch.setattr(engine, "cycle", noted)
    alone = vlm.generate("Describe the scene.", max_new_tokens=40).token_ids
    sizes.clear()

    def work(_: int) -> list[int]:
        ready.wait()
        return vlm.generate("Describe the scene.", max_new_tokens=40).token_ids

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [alone] * 4
    assert max(sizes) > 1
    assert len(sizes) < 4 * 39
