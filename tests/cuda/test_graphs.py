"""Passes recorded as CUDA graphs: the same tokens, however long replies get and who comes next."""

from __future__ import annotations

import pytest
import torch

import fastvlm
from fastvlm.runtimes import RuntimeOptions, decoder_of
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example import HELD_OUT_SCENES, SCENE_PROMPT
from fastvlm_example.scenes import render, sample
from tests.models import IMAGE_SIZE, small_vlm

pytest.importorskip("triton")

from fastvlm.runtimes.cuda_decoder import computes_on

LIMIT = 24


@pytest.fixture(autouse=True)
def a_device(device: torch.device) -> None:
    if not computes_on(device):
        pytest.skip("Triton neither compiles nor interprets here.")


def both(device: torch.device) -> list[VisionLanguageModel]:
    made = small_vlm()
    model = made.model.to(device, torch.float32).eval()
    options = (RuntimeOptions("torch"), RuntimeOptions("cuda"))
    return [
        VisionLanguageModel(model, made.tokenizer, decoder=decoder_of(model, None, one))
        for one in options
    ]


@pytest.mark.parametrize("name", ["autoregressive", "early-exit", "layer-skip", "prompt-lookup"])
def test_tokens_are_torchs(name: str, device: torch.device) -> None:
    torchs, graphs = both(device)
    images = [render(sample(number), IMAGE_SIZE) for number in range(3)]
    for limit in (LIMIT, 2 * LIMIT, LIMIT):
        wanted, found = (
            [
                reply.token_ids
                for reply in vlm.generate_batch(
                    [SCENE_PROMPT] * 3,
                    images,
                    strategy=vlm.strategy(name),
                    max_new_tokens=limit,
                    seed=3,
                    temperature=1.0,
                )
            ]
            for vlm in (torchs, graphs)
        )
        assert found == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_shipped_draft(dtype: torch.dtype, device: torch.device) -> None:
    vlm = fastvlm.load(device=device, dtype=dtype, runtime="cuda")
    image = render(sample(HELD_OUT_SCENES), vlm.image_size)
    replies = [
        vlm.generate(SCENE_PROMPT, image, strategy=vlm.strategy(name), max_new_tokens=40)
        for name in ("autoregressive", "imitation", "autoregressive")
    ]
    assert replies[1].statistics.acceptance_length > 2
    if dtype == torch.float32:
        assert replies[0].token_ids == replies[1].token_ids == replies[2].token_ids
