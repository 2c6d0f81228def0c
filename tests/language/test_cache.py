"""The cache: slots that are no neighbours, that change hands, and that grow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from fastvlm.decoding import Engine, Request
from fastvlm.functional.errors import InputError
from fastvlm.language import (
    DecoderCache,
    DecoderInputs,
    SplitDecoder,
    capture_decoder_inputs,
    split_decoder,
)
from fastvlm.language.cache import BLOCK_POSITIONS
from tests.families import END, FAMILIES, replies
from tests.language.decoding import LIMIT, STRATEGIES, strategy

KINDS = ("llama", "qwen2.5-vl", "blip2-opt", "blip2-t5")
Known = tuple[SplitDecoder, list[DecoderInputs]]
NEXT = [[3, 50, 7], [41, 9, 60], [8, 8, 22], [70, 5, 31]]
"""Tokens that go on from the prompts."""


@pytest.fixture(params=KINDS)
def known(request: pytest.FixtureRequest) -> Known:
    """A decoder and four prompts of different lengths."""
    model, inputs = FAMILIES[request.param]()
    request.node.model = model  # a decoder keeps no model alive
    return split_decoder(model), capture_decoder_inputs(model, inputs(4))


@torch.inference_mode()
def prefill(decoder: SplitDecoder, cache: DecoderCache, slot: int, prompt: DecoderInputs) -> Tensor:
    """Give a slot to a prompt and compute it; return its last state."""
    length = len(prompt.token_ids)
    cache.reserve(slot + 1, length)
    cache.assign(slot, prompt)
    positions = cache.positions([0], length, [slot])
    x = prompt.embeddings[None]
    return decoder.forward_layers(x, positions, cache, range(decoder.depth))[0, -1]


@torch.inference_mode()
def go_on(
    decoder: SplitDecoder,
    cache: DecoderCache,
    slots: Sequence[int],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
) -> Tensor:
    """Compute more tokens of slots in one pass: (slots, tokens, d_model)."""
    cache.reserve(0, max(starts) + len(tokens[0]))
    positions = cache.positions(starts, len(tokens[0]), slots)
    x = decoder.embed(torch.tensor(tokens))
    return decoder.forward_layers(x, positions, cache, range(decoder.depth))


def alone(decoder: SplitDecoder, prompt: DecoderInputs, tokens: Sequence[int]) -> Tensor:
    """The states of tokens after a prompt in a cache of their own: (tokens, d_model)."""
    cache = decoder.cache()
    prefill(decoder, cache, 0, prompt)
    return go_on(decoder, cache, [0], [len(prompt.token_ids)], [tokens])[0]


@torch.inference_mode()
def poison(cache: DecoderCache, slot: int) -> None:
    """Write what is no number wherever a slot may write."""
    for layer in cache.layers.values():
        layer.keys[slot] = layer.values[slot] = torch.nan


@pytest.mark.parametrize("slots", [[3, 0, 2], [0, 2], [2, 3], [1], [3, 2, 1, 0]])
@pytest.mark.parametrize("aligned", [False, True])
def test_slots_give_the_same_as_alone(known: Known, slots: list[int], aligned: bool) -> None:
    decoder, prompts = known
    if aligned:
        prompts = [prompts[0]] * 4
    cache = decoder.cache()
    for slot in (2, 0, 3, 1):
        prefill(decoder, cache, slot, prompts[slot])
    starts = [len(prompts[slot].token_ids) for slot in slots]
    found = go_on(decoder, cache, slots, starts, [NEXT[slot] for slot in slots])
    for row, slot in enumerate(slots):
        torch.testing.assert_close(found[row], alone(decoder, prompts[slot], NEXT[slot]))


def test_a_rejected_draft_is_written_over(known: Known) -> None:
    decoder, prompts = known
    cache = decoder.cache()
    for slot, prompt in enumerate(prompts):
        prefill(decoder, cache, slot, prompt)
    starts = [len(prompt.token_ids) for prompt in prompts]
    go_on(decoder, cache, range(4), starts, [[11, 12, 13, 14, 15]] * 4)
    found = go_on(decoder, cache, range(4), starts, NEXT)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(found[row], alone(decoder, prompt, NEXT[row]))


def test_growth_keeps_what_is_written(known: Known) -> None:
    decoder, prompts = known
    cache = decoder.cache()
    first = prefill(decoder, cache, 0, prompts[0])
    prefill(decoder, cache, 1, prompts[1])
    before, room = cache.nbytes, cache.capacity
    cache.reserve(1, 1)
    assert (cache.nbytes, cache.capacity, cache.slots) == (before, room, 2)
    cache.reserve(4, room + 1)
    assert cache.slots == 4
    assert cache.capacity == room + BLOCK_POSITIONS
    assert cache.nbytes > before
    prefill(decoder, cache, 3, prompts[3])
    slots = [1, 3, 0]
    starts = [len(prompts[slot].token_ids) for slot in slots]
    found = go_on(decoder, cache, slots, starts, [NEXT[slot] for slot in slots])
    for row, slot in enumerate(slots):
        torch.testing.assert_close(found[row], alone(decoder, prompts[slot], NEXT[slot]))
    assert torch.equal(first, prefill(decoder, decoder.cache(), 0, prompts[0]))


@torch.inference_mode()
def test_a_slot_that_moves_goes_on(known: Known) -> None:
    decoder, prompts = known
    cache = decoder.cache()
    for slot, prompt in enumerate(prompts[:3]):
        prefill(decoder, cache, slot, prompt)
    go_on(decoder, cache, [0, 2], [len(prompts[slot].token_ids) for slot in (0, 2)], NEXT[:2])
    cache.release(0)
    cache.move(2, 0)
    poison(cache, 2)
    slots = [0, 1]
    moved = [prompts[2], prompts[1]]
    starts = [len(prompt.token_ids) for prompt in moved]
    found = go_on(decoder, cache, slots, starts, NEXT[:2])
    for row, prompt in enumerate(moved):
        torch.testing.assert_close(found[row], alone(decoder, prompt, NEXT[row]))


def test_what_a_slot_held_never_reaches_the_next_request(known: Known) -> None:
    """Nor its neighbours, which read as far as the longest of them."""
    decoder, prompts = known
    cache = decoder.cache(4, 500)
    for slot, prompt in enumerate(prompts):
        prefill(decoder, cache, slot, prompt)
    for slot in (1, 2):
        cache.release(slot)
        poison(cache, slot)
    # The shortest in the longest one's company.
    held = {0: 0, 1: 3, 2: 1, 3: 3}
    for slot in (1, 2):
        prefill(decoder, cache, slot, prompts[held[slot]])
    slots = [2, 0, 3, 1]
    starts = [len(prompts[held[slot]].token_ids) for slot in slots]
    tokens = [NEXT[slot] for slot in slots]
    found = go_on(decoder, cache, slots, starts, tokens)
    for row, slot in enumerate(slots):
        torch.testing.assert_close(found[row], alone(decoder, prompts[held[slot]], NEXT[slot]))


def test_nothing_is_filled_beyond_what_is_read(known: Known) -> None:
    decoder, prompts = known
    cache = decoder.cache(2, 500)
    prefill(decoder, cache, 0, prompts[0])
    for slot in range(2):
        cache.release(slot)
        poison(cache, slot)
    prefill(decoder, cache, 0, prompts[0])
    length = len(prompts[0].token_ids)
    for layer in cache.layers.values():
        for tensor in (layer.keys, layer.values):
            assert tensor[0, :, BLOCK_POSITIONS:].isnan().all()
            assert tensor[1].isnan().all()
            assert not tensor[0, :, :length].isnan().any()


def test_an_exported_slot_goes_on_in_another(known: Known) -> None:
    decoder, prompts = known
    cache = decoder.cache()
    for slot, prompt in enumerate(prompts):
        prefill(decoder, cache, slot, prompt)
    length = len(prompts[1].token_ids)
    state = cache.export_slot(1, length, decoder.depth)
    assert sum(tensor.nbytes for tensor in state.values()) == cache.exported_bytes(
        length, decoder.depth
    )
    other = decoder.cache(3, 200)
    for part in (length, max(length - 2, 0)):
        other.assign(2, prompts[1])
        poison(other, 2)
        other.import_slot(2, state, part)
        with torch.inference_mode():
            x = torch.cat((prompts[1].embeddings[part:], decoder.embed(torch.tensor(NEXT[1]))))
            positions = other.positions([part], len(x), [2])
            found = decoder.forward_layers(x[None], positions, other, range(decoder.depth))[0]
        torch.testing.assert_close(found[-3:], alone(decoder, prompts[1], NEXT[1]))


def test_a_slot_that_changes_hands_has_the_new_prompts_positions() -> None:
    cache = DecoderCache(torch.device("cpu"), 2, 8)
    plain = DecoderInputs([1, 2, 3], torch.zeros(3, 4))
    placed = DecoderInputs([1, 2, 3], torch.zeros(3, 4), position_ids=torch.tensor([[0, 0, 5]]))
    for prompt, expected in ((plain, None), (placed, [[[0, 0, 5]]]), (plain, None)):
        cache.assign(0, prompt)
        found = cache.positions([0], 3, [0]).position_ids
        assert (None if found is None else found.tolist()) == expected
        # Beside a neighbour, a row's positions are its own.
        cache.assign(1, placed)
        both = cache.positions([0, 0], 3).position_ids
        assert both is not None
        assert both.tolist() == [[(expected or [[[0, 1, 2]]])[0][0], [0, 0, 5]]]


def test_positions_beyond_the_capacity_are_refused(known: Known) -> None:
    decoder, _ = known
    cache = decoder.cache(1, 10)
    with pytest.raises(InputError, match=f"cache was made for {cache.capacity}"):
        cache.positions([cache.capacity - 1], 2)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", KINDS)
def test_requests_that_enter_and_leave_at_different_times(family: str, name: str) -> None:
    """Each decodes to the tokens of generate, in slots whose memory was no number before."""
    model, inputs = FAMILIES[family]()
    expected = replies(model, inputs(4), LIMIT)
    decoder = split_decoder(model)
    prompts = capture_decoder_inputs(model, inputs(4))
    drafts, ends = strategy(name, decoder), frozenset({END})
    # The long prompts wait for the short ones' slots.
    engine = Engine(decoder, max_slots=3)
    limits = [LIMIT, 3, LIMIT, 5, LIMIT, LIMIT, 2, LIMIT]
    requests = [
        Request(prompts[number % 4], drafts, limit, end_token_ids=ends)
        for number, limit in enumerate(limits)
    ]
    poisoned, coming = 0, iter(requests)
    while not all(request.finished for request in requests):
        for request in islice(coming, 1):
            engine.add(request)
        engine.step()
        for slot in {*range(engine.cache.slots)} - {slot.index for slot in engine.slots}:
            poison(engine.cache, slot)
            poisoned += 1
    assert poisoned > 3
    for number, (request, limit) in enumerate(zip(requests, limits, strict=True)):
        assert request.error is None
        assert request.output_token_ids == expected[number % 4][:limit]


def test_an_encoders_states_are_projected_once() -> None:
    """Cross-attention's keys and values: once for a slot, while the same slots decode."""
    model, inputs = FAMILIES["blip2-t5"]()
    decoder = split_decoder(model)
    prompts = capture_decoder_inputs(model, inputs(4))
    calls: list[int] = []

    def count(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        calls.append(len(given[0]))

    hook = decoder.layers[2].layer[1].EncDecAttention.k.register_forward_hook(count)
    cache = decoder.cache()
    for slot in range(3):
        prefill(decoder, cache, slot, prompts[slot])
    assert calls == [1, 1, 1]
    for place in range(1, 4):
        go_on(decoder, cache, [2, 0], [place] * 2, [[5], [9]])
    go_on(decoder, cache, [1], [1], [[5]])
    hook.remove()
    assert calls == [1, 1, 1]
