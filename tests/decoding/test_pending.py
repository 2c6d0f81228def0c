"""Cycles without a draft: what the network missed, it catches up on, and no token changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from fastvlm.decoding import Autoregressive, Engine, Request, SelfSpeculative
from fastvlm.decoding.batch import Batch
from fastvlm.decoding.draft_loop import Draft
from fastvlm.drafting import AdaptiveLength, throughput
from fastvlm.drafting.draft_length import Progress, Timings
from fastvlm.language import split_decoder
from tests.decoding.conftest import decode, finish, imitation, inputs_of, text_model

PROMPTS = [[5, 9, 33, 7], [11, 12, 11, 12, 11], [40, 3, 8, 60, 21, 22, 23, 50, 51], [6]]
SCRIPT = (0, 0, 3, 0, 2, 2, 0, 0, 0, 0, 4, 1, 0, 6)


class Scripted:
    """Drafts of the lengths of a script, a cycle each, over and over."""

    maximum = 6
    reads_confidence = False

    def __init__(self, script: Sequence[int] = SCRIPT) -> None:
        self.script, self.cycle = script, 0
        self.finished: list[int] = []

    def rests(self, _rows: int, /, *, lag: int | None) -> bool:  # noqa: ARG002
        return False

    def should_continue(self, progress: Progress) -> list[bool]:
        wanted = self.script[self.cycle % len(self.script)]
        return [is_active and progress.steps < wanted for is_active in progress.active]

    def update(self, progress: Progress, accepted: Sequence[int], timings: Timings) -> None:
        assert len(timings.steps) == progress.steps
        assert len(accepted) == len(progress.active)
        self.cycle += 1

    def on_finish(self, tokens: int) -> None:
        self.finished.append(tokens)


class Recorded(SelfSpeculative):
    """Notes each row's tokens before a draft, and the draft."""

    seen: list[tuple[list[int], list[int]]]

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().draft(batch, limits)
        for slot, drafted in zip(batch.slots, draft.rows, strict=True):
            if drafted:
                request = slot.request
                before = [*request.prompt_token_ids, *request.output_token_ids]
                self.seen.append((before, drafted))
        return draft


def recorded(model: PreTrainedModel, length: Scripted, kind: str, blocks: int = 1) -> Recorded:
    made = imitation(model, kind=kind, blocks=blocks, exit_layer=2)
    drafter = Recorded(made.decoder, 2, made.network, length)
    drafter.seen = []
    return drafter


@torch.inference_mode()
def drafted_from_scratch(drafter: SelfSpeculative, tokens: list[int], number: int) -> list[int]:
    """Draft with a network that sees all positions in one pass, anew for each token."""
    decoder, network = drafter.decoder, drafter.network
    assert network is not None
    out: list[int] = []
    while len(out) < number:
        row = torch.tensor([tokens + out])
        cache = decoder.cache(1, row.shape[1])
        positions = cache.positions([0], row.shape[1])
        layers = range(drafter.exit_layer)
        x = decoder.forward_layers(decoder.embed(row), positions, cache, layers)
        scores = decoder.head(network.imitate(x, positions, cache, decoder))
        out.append(int(scores[0, -1].argmax()))
    return out


@pytest.mark.parametrize("family", ["qwen2", "mistral-sliding"])
@pytest.mark.parametrize(("kind", "blocks"), [("block", 1), ("block", 2), ("mlp", 1)])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_late_draft_is_that_of_a_network_that_saw_everything(
    family: str, kind: str, blocks: int, rows: int
) -> None:
    model = text_model(family)
    expected = [r.output_token_ids for r in decode(model, Autoregressive(), PROMPTS[:rows], 40)]
    drafter = recorded(model, Scripted(), kind, blocks)
    # A second batch begins where the script, and the drafter, have been before.
    for _ in range(2):
        replies = decode(model, drafter, PROMPTS[:rows], 40)
        assert [request.output_token_ids for request in replies] == expected
    assert len(drafter.seen) > 8
    for tokens, draft in drafter.seen:
        assert draft == drafted_from_scratch(drafter, tokens, len(draft))


def test_rows_that_ended_early_are_not_in_the_way() -> None:
    model = text_model("qwen2")
    drafter = recorded(model, Scripted((0,) * 25 + (4,)), "block")
    limits = (2, 60, 9, 1)
    requests = [
        Request(inputs_of(model, prompt), drafter, limit)
        for prompt, limit in zip(PROMPTS[::-1], limits, strict=True)
    ]
    finish(Engine(split_decoder(model)), requests)
    for request, prompt, limit in zip(requests, PROMPTS[::-1], limits, strict=True):
        [alone] = decode(model, Autoregressive(), [prompt], limit)
        assert request.output_token_ids == alone.output_token_ids
    assert sorted(drafter.length.finished) == sorted(limits)
    assert drafter.seen
    for tokens, draft in drafter.seen:
        assert draft == drafted_from_scratch(drafter, tokens, len(draft))


@pytest.mark.parametrize("kind", ["block", "mlp"])
def test_a_reply_of_one_token_runs_no_network(kind: str) -> None:
    model = text_model("qwen2")
    drafter = imitation(model, kind=kind, length=AdaptiveLength())
    drafter.network.imitate = None  # type: ignore[method-assign,assignment,union-attr]
    [request] = decode(model, drafter, PROMPTS[:1], 1)
    assert len(request.output_token_ids) == 1
    # After a reply of two tokens, the next is not expected to be longer.
    drafter.length.on_finish(2)
    [request] = decode(model, drafter, PROMPTS[:1], 2)
    assert request.proposed == [0]


class WorkClock:
    """A clock that only work moves: a token through a layer, at a price."""

    def __init__(self, drafter: SelfSpeculative) -> None:
        self.now, self.network_price = 0.0, 0.0
        decoder = drafter.decoder
        forward_layers, forward_blocks = decoder.forward_layers, decoder.forward_blocks

        def layers_at_a_price(x, positions, cache, layers):
            # A wide pass costs little more than a narrow one.
            self.now += len(layers) * (1 + 0.02 * (positions.width - 1))
            return forward_layers(x, positions, cache, layers)

        def blocks_at_a_price(*given):
            self.now += self.network_price
            return forward_blocks(*given)

        decoder.forward_layers, decoder.forward_blocks = layers_at_a_price, blocks_at_a_price

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("rows", [1, 4])
def test_it_drafts_while_that_pays_and_no_token_tells(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few cycles are decoded here, so it may probe more often.
    monkeypatch.setattr(throughput, "PROBE_TIME_SHARE", 0.5)
    model = text_model("qwen2")
    expected = [r.output_token_ids for r in decode(model, Autoregressive(), PROMPTS[:rows], 200)]
    made = imitation(model, perfect=True)
    length = AdaptiveLength(6)
    drafter = SelfSpeculative(made.decoder, 1, made.network, length)
    clock = WorkClock(drafter)
    # The decoder whose work the clock counts.
    engine = Engine(drafter.decoder, clock=clock)

    def decoded() -> list[int]:
        replies = [Request(inputs_of(model, prompt), drafter, 200) for prompt in PROMPTS[:rows]]
        finish(engine, replies)
        assert [request.output_token_ids for request in replies] == expected
        return replies[0].proposed

    dear, cheap = 30.0, 0.1
    clock.network_price = dear
    decoded()
    proposed = decoded()
    assert proposed.count(0) > 0.9 * len(proposed)
    clock.network_price = cheap
    decoded()
    proposed = decoded()
    assert sum(proposed) > 0.7 * 200
    clock.network_price = dear
    decoded()
    proposed = decoded()
    assert proposed.count(0) > 0.9 * len(proposed)
