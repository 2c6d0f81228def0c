"""The engine: requests enter and leave, in any order, and none knows of the others."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, Engine, PromptLookup, Request, Sampler, Strategy
from fastvlm.drafting import AdaptiveLength, FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.language import DecoderInputs, split_decoder
from tests.decoding.conftest import finish, generate, imitation, inputs_of, text_model
from tests.decoding.test_cycle import PROMPTS, STRATEGIES, strategy


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return text_model("qwen2")


def alone(model: PreTrainedModel, prompt: list[int], limit: int) -> list[int]:
    return generate(model, prompt, limit, eos_token_id=None)


def request(
    model: PreTrainedModel, prompt: list[int], limit: int, drafting: Strategy, **options: Any
) -> Request:
    return Request(inputs_of(model, prompt), drafting, limit, **options)


@pytest.mark.parametrize("name", STRATEGIES)
def test_requests_come_and_go_between_steps(name: str, model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_slots=3)
    drafting = strategy(name, model)
    chance = random.Random(name)
    waiting = [
        request(model, prompt, chance.choice((1, 4, 9, 30)), drafting)
        for _ in range(4)
        for prompt in PROMPTS
    ]
    everyone, before = list(waiting), dict.fromkeys(waiting, 0)
    while not all(one.finished for one in everyone):
        while waiting and chance.random() < 0.5:
            engine.add(waiting.pop())
        gained = engine.step()
        assert len(engine.slots) <= 3
        for one in everyone:
            known = len(one.output_token_ids)
            assert known - before[one] == gained.get(one, 0)
            before[one] = known
    for one in everyone:
        expected = alone(model, one.prompt_token_ids, one.max_new_tokens)
        assert one.output_token_ids == expected
        assert one.finish_reason == "length"
    assert not engine.slots
    assert engine.cache.nbytes == 0


def test_requests_of_different_strategies_share_the_engine(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model))
    ways = [strategy(name, model) for name in STRATEGIES]
    requests = [request(model, prompt, 20, way) for way in ways for prompt in PROMPTS]
    finish(engine, requests)
    for one in requests:
        assert one.output_token_ids == alone(model, one.prompt_token_ids, 20)


def test_a_slot_moves_only_to_close_a_gap(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model))
    limits = (3, 30, 6, 12)
    requests = [
        request(model, prompt, limit, PromptLookup(FixedLength(3)))
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    for one in requests:
        engine.add(one)
    engine.step()
    seats = {slot.request: slot.index for slot in engine.slots}
    places = {index: layer.keys.data_ptr() for index, layer in engine.cache.layers.items()}
    late = None
    while engine.step():
        for slot in engine.slots:
            assert slot.index <= seats.get(slot.request, slot.index)
            seats[slot.request] = slot.index
        if engine.slots:
            now = {index: layer.keys.data_ptr() for index, layer in engine.cache.layers.items()}
            assert now == places
        if requests[0].finished and late is None:
            late = request(model, PROMPTS[3], 5, PromptLookup(FixedLength(3)))
            engine.add(late)
    assert late is not None
    # The seat that became free is taken again, and who is left is the first in the end.
    assert seats[late] == seats[requests[0]] == seats[requests[1]] == 0
    for one in (*requests, late):
        assert one.output_token_ids == alone(model, one.prompt_token_ids, one.max_new_tokens)


@pytest.mark.parametrize("name", ["block", "prompt-lookup", "autoregressive"])
def test_a_long_prompt_lets_others_go_on(name: str, model: PreTrainedModel) -> None:
    drafting = {
        "block": lambda: imitation(model, length=FixedLength(3)),
        "prompt-lookup": lambda: PromptLookup(FixedLength(3)),
        "autoregressive": Autoregressive,
    }[name]()
    engine = Engine(split_decoder(model), prefill_positions=4)
    short = request(model, PROMPTS[0], 60, drafting)
    # Nobody waits for the first prompt, so it is not cut.
    engine.add(short)
    assert engine.step()[short] == 1
    chance = random.Random(1)
    long = [[chance.randrange(3, 90) for _ in range(length)] for length in (30, 7, 5)]
    others = [request(model, prompt, 12, drafting) for prompt in long]
    for one in others:
        engine.add(one)
    for _ in range(6):
        assert engine.step()[short] >= 1
        assert not others[0].output_token_ids
    while engine.step():
        pass
    assert short.output_token_ids == alone(model, PROMPTS[0], 60)
    for one, prompt in zip(others, long, strict=True):
        assert one.output_token_ids == alone(model, prompt, 12)


def test_cancelled_requests_leave_at_once(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_slots=2)
    drafting = imitation(model, length=FixedLength(3))
    requests = [request(model, prompt, 40, drafting) for prompt in PROMPTS]
    for one in requests:
        engine.add(one)
    engine.step()
    engine.step()
    assert len(engine.slots) == 2
    engine.cancel(requests[0])
    assert [slot.request for slot in engine.slots] == [requests[1]]
    engine.cancel(requests[3])
    engine.step()
    assert [slot.request for slot in engine.slots] == [requests[1], requests[2]]
    while engine.step():
        pass
    assert [one.finish_reason for one in requests] == ["cancelled", "length", "length", "cancelled"]
    for one in requests[1:3]:
        assert one.output_token_ids == alone(model, one.prompt_token_ids, 40)
    known = alone(model, PROMPTS[0], 40)
    assert requests[0].output_token_ids == known[: len(requests[0].output_token_ids)]
    engine.cancel(requests[1])
    assert requests[1].finish_reason == "length"
    assert engine.cache.nbytes == 0


def failing(tokens: Tensor, scores: Tensor) -> Tensor:
    if tokens.shape[1] > 8:
        raise ValueError("no more")
    return scores


def stops(reply: Sequence[int], _: Any) -> bool:
    if len(reply) > 3:
        raise RuntimeError("enough")
    return False


def test_a_failure_is_its_own_requests(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model))
    drafting = imitation(model, length=FixedLength(3))
    good = [request(model, prompt, 20, drafting) for prompt in PROMPTS]
    wrong = DecoderInputs(PROMPTS[0], torch.zeros(len(PROMPTS[0]), 7, dtype=torch.float64))
    bad = {
        "an embedding": Request(wrong, drafting, 20),
        "a processor": request(
            model, PROMPTS[0], 20, drafting, sampler=Sampler([failing], None, PROMPTS[0])
        ),
        "a criterion": request(model, PROMPTS[1], 20, drafting, stops=stops),
        "a prompt that is too long": request(model, [5] * 256, 20, drafting),
        "no limit": request(model, PROMPTS[1], 0, drafting),
    }
    for one in (*bad.values(), *good):
        engine.add(one)
    while engine.step():
        pass
    for name, one in bad.items():
        assert one.finish_reason == "error", name
        assert one.error is not None
    assert isinstance(bad["a prompt that is too long"].error, InputError)
    assert str(bad["a processor"].error) == "no more"
    assert len(bad["a criterion"].output_token_ids) == 4
    for one in good:
        assert one.output_token_ids == alone(model, one.prompt_token_ids, 20)
    assert engine.cache.nbytes == 0


class Forgetful(Autoregressive):
    """Can't be told how long a reply was."""

    def on_finish(self, tokens: int) -> None:
        raise RuntimeError(f"{tokens} are too many")


def test_what_fails_at_the_beginning_or_the_end_keeps_nobody_waiting(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(split_decoder(model))
    good = request(model, PROMPTS[0], 12, PromptLookup(FixedLength(3)))
    engine.add(good)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "reserve", lambda *_: 1 / 0)
        bad = request(model, PROMPTS[1], 12, PromptLookup(FixedLength(3)))
        engine.add(bad)
        engine.step()
    assert isinstance(bad.error, ZeroDivisionError)
    forgetful = request(model, PROMPTS[2], 5, Forgetful())
    with pytest.warns(UserWarning, match="5 are too many"):
        finish(engine, [forgetful])
    assert forgetful.output_token_ids == alone(model, PROMPTS[2], 5)
    while engine.step():
        pass
    assert good.output_token_ids == alone(model, PROMPTS[0], 12)


class Interrupted(Autoregressive):
    """Is interrupted in the middle of a step, once."""

    done = False

    def draft(self, batch: Any, limits: Sequence[int]) -> Any:
        if not Interrupted.done:
            Interrupted.done = True
            raise KeyboardInterrupt
        return super().draft(batch, limits)


def test_an_interrupted_step_can_be_made_again(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model))
    ways = [imitation(model, length=FixedLength(3)), Interrupted()]
    requests = [request(model, prompt, 15, ways[row % 2]) for row, prompt in enumerate(PROMPTS)]
    for one in requests:
        engine.add(one)
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.step():
        pass
    for one in requests:
        assert one.output_token_ids == alone(model, one.prompt_token_ids, 15)


def test_who_stops_reading_cancels_the_rest(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model), max_slots=2)
    made: list[Request] = []

    def source() -> Any:
        for prompt in PROMPTS * 5:
            made.append(request(model, prompt, 30 if len(made) % 2 else 5, Autoregressive()))
            yield made[-1]

    running = engine.run(source())
    next(running)
    # Requests are made as slots become free, not all at once.
    assert len(made) <= 3
    running.close()
    assert not engine.slots
    assert {one.finish_reason for one in made} == {"length", "cancelled"}


def test_a_request_decodes_once(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model))
    one = request(model, PROMPTS[0], 5, Autoregressive())
    engine.add(one)
    with pytest.raises(InputError):
        engine.add(one)
    while engine.step():
        pass
    # What has ended is not begun again.
    engine.add(one)
    assert engine.step() == {}
    assert len(one.output_token_ids) == 5


@pytest.mark.parametrize("options", [{"max_slots": 0}, {"prefill_positions": 0}])
def test_an_engine_without_room_is_refused(options: dict[str, int], model: PreTrainedModel) -> None:
    with pytest.raises(InputError):
        Engine(split_decoder(model), **options)


def test_a_model_that_is_cast_fails_what_it_decodes_and_nothing_else() -> None:
    model = text_model("qwen2")
    engine = Engine(split_decoder(model))
    drafting = imitation(model, length=FixedLength(3))
    first = request(model, PROMPTS[0], 40, drafting)
    engine.add(first)
    engine.step()
    model.float()
    second = request(model, PROMPTS[1], 12, drafting)
    engine.add(second)
    while engine.step():
        pass
    assert first.finish_reason == "error"
    assert second.output_token_ids == alone(model, PROMPTS[1], 12)


def test_thousands_of_requests_leave_nothing_behind(model: PreTrainedModel) -> None:
    engine = Engine(split_decoder(model))
    drafting = imitation(model, length=AdaptiveLength(4))

    def decode(number: int) -> None:
        for _ in range(number):
            finish(engine, [request(model, PROMPTS[3], 2, drafting)])

    decode(20)
    gc.collect()
    objects = len(gc.get_objects())
    decode(200)
    gc.collect()
    assert len(gc.get_objects()) < objects + 200
    assert engine.cache.nbytes == 0
