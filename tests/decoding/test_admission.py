"""Requests enter as slots and memory allow, in the order of their priority and arrival."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, Engine, Request, Strategy, admission
from fastvlm.decoding.admission import PRIORITY_SECONDS
from fastvlm.drafting import AdaptiveLength, FixedLength
from fastvlm.functional import memory
from fastvlm.functional.errors import InputError
from fastvlm.functional.memory import available_memory
from fastvlm.language import split_decoder
from fastvlm.language.cache import BLOCK_POSITIONS
from tests.decoding.conftest import finish, generate, imitation, inputs_of, text_model
from tests.decoding.test_cycle import PROMPTS

LAYER_BYTES = 2 * 2 * 16 * 8
"""Of a position: keys and values of two heads of 16 numbers in float64."""
BLOCK = 5 * BLOCK_POSITIONS * LAYER_BYTES
"""Bytes of a block of one slot in all layers."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return text_model("qwen2")


def request(
    model: PreTrainedModel, prompt: list[int], limit: int, strategy: Strategy, **options: Any
) -> Request:
    return Request(inputs_of(model, prompt), strategy, limit, **options)


def alone(model: PreTrainedModel, one: Request) -> list[int]:
    return generate(model, one.prompt_token_ids, one.max_new_tokens, eos_token_id=None)


def decoding(engine: Engine) -> list[Request]:
    return [slot.request for slot in engine.slots]


class Clock:
    """A time that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("drafts", [False, True])
def test_requests_wait_until_the_cache_has_room(model: PreTrainedModel, *, drafts: bool) -> None:
    strategy = imitation(model, length=FixedLength(3)) if drafts else Autoregressive()
    row = BLOCK * (6 if drafts else 5) // 5
    engine = Engine(split_decoder(model), max_cache_bytes=2 * row)
    requests = [request(model, PROMPTS[n % 4], 12 + 5 * n, strategy) for n in range(5)]
    for one in requests:
        engine.add(one)
    most = 0
    while engine.step():
        most = max(most, len(engine.slots))
        assert engine.cache.nbytes <= 2 * row
    assert most == 2
    assert not engine.waiting
    for one in requests:
        assert one.output_token_ids == alone(model, one)


def test_nobody_overtakes_one_that_needs_more_room(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_cache_bytes=3 * BLOCK)
    finish(engine, [request(model, PROMPTS[0], 2, Autoregressive())])
    # The cache is rectangular: beside a short one, the long one would take six blocks.
    short, long, last = (request(model, PROMPTS[0], n, Autoregressive()) for n in (20, 150, 10))
    for one in (short, long, last):
        engine.add(one)
    while not short.finished:
        engine.step()
        assert decoding(engine) in ([short], [])
    while not long.finished:
        engine.step()
        assert decoding(engine) in ([long], [])
    while engine.step():
        pass
    for one in (short, long, last):
        assert one.output_token_ids == alone(model, one)


def test_one_that_never_fits_is_refused(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_cache_bytes=2 * BLOCK)
    # What a position takes is known once one is computed.
    first, fits = (request(model, PROMPTS[0], n, Autoregressive()) for n in (150, 100))
    for one in (first, fits):
        engine.add(one)
    while engine.step():
        pass
    assert isinstance(first.error, InputError)
    assert f"{3 * BLOCK:,}" in str(first.error)
    assert f"{2 * BLOCK:,}" in str(first.error)
    assert fits.output_token_ids == alone(model, fits)
    later = request(model, PROMPTS[0], 150, Autoregressive())
    engine.add(later)
    assert str(later.error) == str(first.error)
    assert not engine.waiting


def test_a_cache_may_grow_to_its_bound_and_no_further(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_cache_bytes=3 * BLOCK)
    requests = [request(model, PROMPTS[n % 4], 20, Autoregressive()) for n in range(4)]
    for one in requests:
        engine.add(one)
        engine.step()
    # Room is made for twice as many slots, where there is room for so many.
    assert len(engine.slots) == 3
    assert engine.cache.nbytes == 3 * BLOCK


def test_the_layers_of_a_network_count_for_those_beside_it(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_cache_bytes=2 * BLOCK)
    finish(engine, [request(model, PROMPTS[0], 2, Autoregressive())])
    drafting = request(model, PROMPTS[0], 20, imitation(model, length=FixedLength(3)))
    ordinary = request(model, PROMPTS[1], 20, Autoregressive())
    for one in (drafting, ordinary):
        engine.add(one)
    engine.step()
    # Both would fit without the network.
    assert decoding(engine) == [drafting]
    while engine.step():
        assert engine.cache.nbytes <= 2 * BLOCK
    assert ordinary.output_token_ids == alone(model, ordinary)


def test_a_model_in_another_precision_is_measured_anew() -> None:
    model = text_model("qwen2")
    engine = Engine(split_decoder(model), max_cache_bytes=BLOCK)
    finish(engine, [request(model, PROMPTS[0], 20, Autoregressive())])
    model.float()
    first, second = (request(model, PROMPTS[n], 20, Autoregressive()) for n in range(2))
    for one in (first, second):
        engine.add(one)
    engine.step()
    engine.step()
    # Of half the size, both fit.
    assert decoding(engine) == [first, second]


def test_without_a_bound_half_of_what_is_left_is_taken(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = split_decoder(model)
    for left, bound in ((2 * BLOCK, BLOCK), (None, None)):
        monkeypatch.setattr(admission, "available_memory", lambda _, left=left: left)
        assert Engine(decoder).admission.max_cache_bytes == bound
    with pytest.raises(InputError):
        Engine(decoder, max_cache_bytes=0)


def test_lower_priorities_enter_earlier(model: PreTrainedModel) -> None:
    clock = Clock()
    engine = Engine(split_decoder(model), max_slots=1, clock=clock)
    priorities = [0, 3, 0, -1, 1, -1]
    requests = [
        request(model, PROMPTS[n % 4], 3, Autoregressive(), priority=priority)
        for n, priority in enumerate(priorities)
    ]
    for one in requests:
        clock.now += 1
        engine.add(one)
    assert engine.waiting == [requests[n] for n in (3, 5, 0, 2, 4, 1)]
    assert list(engine.run([])) == []
    ended: list[Request] = []
    while engine.step():
        ended += [one for one in requests if one.finished and one not in ended]
    assert ended == [requests[n] for n in (3, 5, 0, 2, 4, 1)]
    assert all(one.output_token_ids == alone(model, one) for one in requests)


def test_waiting_counts_so_that_nobody_waits_for_ever(model: PreTrainedModel) -> None:
    clock = Clock()
    engine = Engine(split_decoder(model), max_slots=1, clock=clock)
    patient, early, late = (
        request(model, PROMPTS[0], 3, Autoregressive(), priority=priority) for priority in (1, 0, 0)
    )
    engine.add(patient)
    clock.now = PRIORITY_SECONDS - 1
    engine.add(early)
    clock.now = PRIORITY_SECONDS + 1
    engine.add(late)
    assert engine.waiting == [early, patient, late]
    engine.cancel(patient)
    assert engine.waiting == [early, late]


def test_a_full_batch_drafts_nothing_where_that_costs_throughput(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer takes a fixed time and one for each position, the network that of two layers."""
    clock, decoder = Clock(), split_decoder(model)
    strategy = imitation(model, exit_layer=2, perfect=True, length=AdaptiveLength(6))

    def take(layers: int, positions: Any) -> None:
        clock.now += layers * (12 + positions.width * len(positions.slots))

    def forward_layers(x: Tensor, positions: Any, cache: Any, layers: Sequence[int]) -> Tensor:
        take(len(layers), positions)
        return own.forward_layers(x, positions, cache, layers)

    def forward_blocks(x: Tensor, positions: Any, *rest: Any) -> Tensor:
        take(2, positions)
        return own.forward_blocks(x, positions, *rest)

    own = split_decoder(model)
    for one in (decoder, strategy.decoder):
        monkeypatch.setattr(one, "forward_layers", forward_layers)
        monkeypatch.setattr(one, "forward_blocks", forward_blocks)
    engine = Engine(decoder, max_slots=24, clock=clock)

    def seconds_per_token(rows: int, drafting: Strategy) -> tuple[float, list[Request]]:
        requests = [request(model, PROMPTS[n % 4], 60, drafting) for n in range(rows)]
        begun = clock.now
        finish(engine, requests)
        return (clock.now - begun) / sum(len(r.output_token_ids) for r in requests), requests

    for rows, most in ((1, 0.95), (24, 1.03)):
        for _ in range(3):
            seconds, requests = seconds_per_token(rows, strategy)
        assert seconds < most * seconds_per_token(rows, Autoregressive())[0]
        drafted = sum(sum(one.proposed) for one in requests)
        # Of a full batch, at most a probe.
        assert drafted > 20 if rows == 1 else drafted <= 6 * rows
    expected = {
        tuple(prompt): alone(model, one) for prompt, one in zip(PROMPTS, requests, strict=False)
    }
    assert all(one.output_token_ids == expected[tuple(one.prompt_token_ids)] for one in requests)


def test_the_memory_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       64 kB\nMemAvailable:   32 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    device = torch.device("cpu")
    assert available_memory(device) == 32 * 1024
    # In a container.
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, left in (("max", 32 * 1024), ("5000", 4000), ("500", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert available_memory(device) == left
    meminfo.unlink()
    assert available_memory(device) is None
    assert available_memory(torch.device("meta")) is None


def test_a_pass_that_prepares_others_is_not_measured(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = AdaptiveLength(4)
    strategy = imitation(model, length=length)
    counted = itertools.count()
    for prepares, measured in ((True, False), (False, True)):
        made = property(lambda _: next(counted)) if prepares else property(lambda _: 1)
        monkeypatch.setattr(type(strategy.decoder), "prepared", made)
        finish(Engine(strategy.decoder), [request(model, PROMPTS[0], 40, strategy)])
        assert length.throughput(1).is_measured == measured
