"""Hostile requests, while others are answered; `benchmarks/serving_faults.py` sends many more."""

from __future__ import annotations

import random
import time

import pytest
import torch

import hostile_requests
import serving_faults
from hostile_requests import KINDS, Attacker, attack
from tests.models import small_vlm
from tests.serving.serving import served

KEY = "key-of-mine"
SHARE = 5
"""Requests of each kind, of a hundred."""


def test_hostile_requests_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_API_KEY", KEY)
    vlm = small_vlm(torch.float32, max_slots=4)
    image = serving_faults.scene_image()
    # The example of a huge prompt takes seconds to read.
    kinds = {kind: SHARE for kind in KINDS if kind is not hostile_requests.huge_prompts}
    with served(vlm, body_seconds=1) as address:
        steady = serving_faults.Steady(address, KEY, image)
        expected = serving_faults.text_of(steady.ask() or "")
        assert expected.endswith("[DONE]")
        at = Attacker(address, KEY, random.Random(1), image)
        with monkeypatch.context() as patched, steady.asking():
            found = []
            for number, kind in enumerate(kind for kind in kinds for _ in range(SHARE)):
                patched.setattr(hostile_requests, "KINDS", {kind: 1})
                found.append(attack(at, number))
        at.close()
        deadline = time.monotonic() + 10
        while vlm.engine.slots and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not vlm.engine.slots
        assert serving_faults.text_of(steady.ask() or "") == expected
    assert not serving_faults.faults(found)
    assert steady.replies[expected] == steady.replies.total() > 0
    assert {one["status"][0] for one in found} >= {"2", "4"}
