"""The engine on a GPU: seeds, slots, kept prefixes, and the shipped draft in short precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastvlm
import fastvlm_example
from fastvlm.prompts import question
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import HELD_OUT_SCENES
from fastvlm_example.scenes import render, sample
from tests.cuda.reference import reference
from tests.models import IMAGE_SIZE, small_vlm

PROMPT = fastvlm_example.SCENE_PROMPT
LIMIT = 24
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}
IMAGES = [render(sample(number), IMAGE_SIZE) for number in range(6)]


def vlm_on(device: torch.device, **options: Any) -> VisionLanguageModel:
    made = small_vlm()
    return VisionLanguageModel(made.model.to(device).eval(), made.tokenizer, **options)


@pytest.mark.parametrize("name", ["autoregressive", "early-exit", "layer-skip", "prompt-lookup"])
def test_a_seed_draws_the_cpus_reply(name: str, device: torch.device) -> None:
    found = []
    for where in (torch.device("cpu"), device):
        vlm = vlm_on(where)
        strategy = vlm.strategy(name)
        found.append(
            [
                vlm.generate(
                    PROMPT, image, strategy=strategy, seed=seed, max_new_tokens=LIMIT, **SAMPLING
                ).token_ids
                for seed, image in enumerate(IMAGES[:3])
            ]
        )
    assert found[0] == found[1]
    assert len({tuple(reply) for reply in found[0]}) == 3


def test_a_batch_draws_the_cpus_replies(device: torch.device) -> None:
    found = [
        [
            reply.token_ids
            for reply in vlm_on(where).generate_batch(
                [PROMPT] * 3, IMAGES[:3], seed=3, max_new_tokens=LIMIT, **SAMPLING
            )
        ]
        for where in (torch.device("cpu"), device)
    ]
    assert found[0] == found[1]


def test_requests_that_follow_each_other_in_a_slot(device: torch.device) -> None:
    vlm = vlm_on(device)
    strategy = vlm.strategy("early-exit")
    limits = [3, 17, 8, 24, 5, 11]
    alone = [
        vlm.generate(PROMPT, image, strategy=strategy, max_new_tokens=limit).token_ids
        for image, limit in zip(IMAGES, limits, strict=True)
    ]
    fewer = vlm_on(device)
    fewer.engine.max_slots = 2
    requests = [
        fewer.request(PROMPT, image, strategy=strategy, max_new_tokens=limit)
        for image, limit in zip(IMAGES, limits, strict=True)
    ]
    ended = list(fewer.engine.run(requests))
    assert {id(request) for request in ended} == {id(request) for request in requests}
    assert [request.output_token_ids for request in requests] == alone


def test_a_second_question_about_an_image(device: torch.device) -> None:
    other = f"{PROMPT} {PROMPT}"
    vlm, fresh = vlm_on(device), vlm_on(device, prefix_bytes=0)
    vlm.generate(PROMPT, IMAGES[0], max_new_tokens=LIMIT)
    found = vlm.generate(other, IMAGES[0], max_new_tokens=LIMIT)
    assert found.token_ids == fresh.generate(other, IMAGES[0], max_new_tokens=LIMIT).token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_shipped_draft(dtype: torch.dtype, device: torch.device) -> None:
    vlm = fastvlm.load(device=device, dtype=dtype, prefix_bytes=0)
    image = render(sample(HELD_OUT_SCENES), vlm.image_size)
    inputs = vlm.prompts.inputs(question(PROMPT, image))
    known = reference(vlm.model, inputs, 40, vlm.end_tokens)
    for name in ("autoregressive", "imitation"):
        reply = vlm.generate(PROMPT, image, strategy=vlm.strategy(name), max_new_tokens=40)
        known.assert_equal([reply.token_ids])
    assert reply.statistics.acceptance_length > 2
