"""A random life: requests of all kinds from many threads, each with the reply that it has alone."""

from __future__ import annotations

import copy
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fastvlm.decoding import Autoregressive, Engine, Request, SelfSpeculative, Strategy
from fastvlm.drafting import AdaptiveLength, FixedLength
from fastvlm.language.decoder import cache_name
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.decoding.conftest import imitation
from tests.models import small_vlm

TIE = 1e-4
"""Two best scores that lie closer may change places by float32's rounding."""
TEXTS = ("The?", "Describe the scene.", "What is at the top left? Say it.", "Is it red? " * 6)


@dataclass(frozen=True)
class Case:
    """What is asked, and the reply that it has alone."""

    text: str
    image: int | None
    options: dict[str, Any]
    expected: list[int] = field(hash=False, default_factory=list)


class WatchedEngine(Engine):
    """Recomputes every entry of the cache in float64, after some of its steps."""

    exact: Any = None
    left = 0
    chance = random.Random(0)
    checked = 0

    def _free_finished(self) -> None:
        if self.left and self.slots and self.chance.random() < 0.1:
            self.left -= 1
            for slot in self.slots:
                self.check(slot)
        super()._free_finished()

    def check(self, slot: Any) -> None:
        """Compare a slot with a pass of the whole model over its tokens."""
        request, length = slot.request, slot.length
        if not length:
            return
        exact = self.exact.get_decoder()
        reply = torch.tensor(request.output_token_ids, dtype=torch.long)
        embeddings = request.inputs.embeddings.double()
        embedded = torch.cat((embeddings, exact.embed_tokens(reply)))[:length]
        whole = exact(inputs_embeds=embedded[None], use_cache=True)[cache_name(exact)]
        for layer in range(self.decoder.depth):
            found, expected = self.cache.layers[layer], whole.layers[layer]
            for ours, theirs in ((found.keys, expected.keys), (found.values, expected.values)):
                close = ours[slot.index, :, :length].double() - theirs[0]
                assert close.abs().max() < 2e-3 * max(1.0, float(theirs.abs().max()))
        self.checked += length


def strategies(vlm: VisionLanguageModel) -> list[Strategy]:
    """Return all strategies, with rules of all kinds; each object serves any number of requests."""
    decoder = vlm.decoder
    return [
        vlm.strategy("autoregressive"),
        vlm.strategy("prompt-lookup"),
        vlm.strategy("early-exit"),
        vlm.strategy("layer-skip", confidence=0, num_speculative_tokens=3),
        SelfSpeculative(decoder, 2, length=AdaptiveLength(5)),
        imitation(vlm.model, length=AdaptiveLength(6)),
        vlm.strategy("cascade", network=imitation(vlm.model, exit_layer=2).network),
        imitation(vlm.model, kind="mlp", exit_layer=2, length=FixedLength(2)),
        imitation(vlm.model, exit_layer=2, perfect=True, length=FixedLength(4)),
    ]


def cases(vlm: VisionLanguageModel, images: list[Any], number: int) -> list[Case]:
    """Return different questions, each with its reply by ordinary decoding, alone."""
    chance = random.Random(5)
    engine = Engine(vlm.decoder, max_slots=1)
    found = []
    for _ in range(number):
        options: dict[str, Any] = {"max_new_tokens": chance.choice((1, 3, 8, 20, 40))}
        if chance.random() < 0.5:
            options |= {"temperature": chance.choice((0.7, 1.0)), "seed": chance.randrange(2**64)}
            options |= chance.choice(({}, {"top_p": 0.9}, {"top_k": 20}))
        if chance.random() < 0.2:
            options["repetition_penalty"] = 1.3
        if chance.random() < 0.2:
            options |= {"frequency_penalty": 0.6, "logit_bias": {chance.randrange(300): 3.0}}
        image = chance.choice((None, *range(len(images))))
        text = chance.choice(TEXTS)
        request = vlm.request(
            text, None if image is None else images[image], strategy=Autoregressive(), **options
        )
        for _ in engine.run([request]):
            pass
        assert request.error is None
        found.append(Case(text, image, options, request.output_token_ids))
    return found


class Life:
    """What the threads do."""

    def __init__(self, vlm: VisionLanguageModel, images: list[Any], asked: list[Case]) -> None:
        self.vlm, self.images, self.asked = vlm, images, asked
        self.ways = strategies(vlm)
        self.outcomes: Counter[str] = Counter()
        self.ties: list[float] = []

    def live(self, seed: int, number: int) -> None:
        """Make requests of all kinds."""
        chance = random.Random(seed)
        done = 0
        while done < number:
            case = chance.choice(self.asked)
            image = None if case.image is None else self.images[case.image]
            way, kind = chance.choice(self.ways), chance.random()
            if kind < 0.45:
                reply = self.vlm.generate(case.text, image, strategy=way, **case.options)
                self.compare(case, reply.token_ids)
                done += 1
            elif kind < 0.65:
                done += self.batch(chance, way)
            else:
                self.stream(chance, case, image, way)
                done += 1

    def batch(self, chance: random.Random, way: Strategy) -> int:
        """Decode a few cases together, some of which can't be asked; perhaps break off."""
        some = chance.sample(self.asked, chance.randint(1, 5))
        stop = chance.randint(0, len(some)) if chance.random() < 0.3 else None
        answers: dict[int, Request] = {}

        def source() -> Iterator[Request]:
            for number, case in enumerate(some):
                image = None if case.image is None else self.images[case.image]
                answers[number] = self.vlm.request(case.text, image, strategy=way, **case.options)
                yield answers[number]

        running = self.vlm.engine.run(source())
        for number, _ in enumerate(running):
            if number == stop:
                running.close()
                break
        for number, request in answers.items():
            if request.finish_reason == "cancelled":
                self.outcomes["cancelled"] += 1
            else:
                self.compare(some[number], request.output_token_ids)
        return len(some)

    def stream(self, chance: random.Random, case: Case, image: Any, way: Strategy) -> None:
        """Read a stream to its end, or close it, or forget it in the middle."""
        stream = self.vlm.stream(case.text, image, strategy=way, **case.options)
        pieces = chance.choice((0, 1, 2, 10**6))
        tokens: list[int] = []
        for _ in range(pieces):
            piece = next(stream, None)
            if piece is None:
                break
            tokens += piece.token_ids
        if pieces == 10**6:
            self.compare(case, tokens)
        else:
            assert tokens == case.expected[: len(tokens)] or self.tie(case, tokens)
            self.outcomes["abandoned"] += 1
            if chance.random() < 0.5:
                stream.close()

    def compare(self, case: Case, tokens: list[int]) -> None:
        """Count a reply, which is that of its case but where rounding alone decides."""
        if tokens != case.expected:
            assert self.tie(case, tokens), (case, tokens)
            self.outcomes["ties"] += 1
        self.outcomes["replies"] += 1

    def tie(self, case: Case, tokens: list[int]) -> bool:
        """Return whether the two best scores where replies part are the same but for rounding."""
        same = 0
        while tokens[same] == case.expected[same]:
            same += 1
        image = None if case.image is None else self.images[case.image]
        request = self.vlm.request(
            case.text,
            image,
            strategy=Autoregressive(),
            **{**case.options, "max_new_tokens": same + 1},
        )
        request.keeps_logits = True
        for _ in Engine(self.vlm.decoder, max_slots=1).run([request]):
            pass
        from fastvlm.decoding.sampler import noisy

        sampler = request.sampler
        scores = sampler.apply_processors(request.output_token_ids[:same], request.logits[same])
        best = noisy(scores[None], [sampler.seed], [same])[0].topk(2).values
        self.ties.append(float(best[0] - best[1]))
        return self.ties[-1] < TIE


def lead(requests: int, threads: int, checks: int) -> Life:
    """Let threads live with one model, and look at what they leave."""
    vlm = small_vlm(torch.float32)
    images = [render(sample(number), 128) for number in range(4)]
    asked = cases(vlm, images, 40)
    vlm.lru.limit = 2**20
    engine = WatchedEngine(vlm.decoder, max_slots=6, prefill_positions=16)
    engine.exact, engine.left = copy.deepcopy(vlm.model).double(), checks
    vlm.engine = engine
    life, before = Life(vlm, images, asked), threading.active_count()
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(life.live, n, requests // threads) for n in range(threads)]:
            future.result()
    gc.collect()
    assert not engine.slots
    assert not engine.waiting
    assert engine.cache.nbytes == 0
    assert threading.active_count() == before
    assert engine.checked
    # What the closing note quotes: `pytest -s`.
    sys.stdout.write(f"{dict(life.outcomes)}, ties {life.ties}, recomputed {engine.checked}\n")
    return life


def test_a_short_life() -> None:
    life = lead(120, 4, 5)
    assert life.outcomes["replies"] > 50


@pytest.mark.slow
def test_a_long_life() -> None:
    """2,000 requests from 8 threads; 50 steps are recomputed."""
    life = lead(2000, 8, 50)
    assert life.outcomes["replies"] > 1000
    assert life.outcomes["ties"] < 10
