"""Decoding by our own kernels, on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastvlm.functional.errors import InputError
from fastvlm.language import split_decoder
from tests.runtimes.conftest import CONFIGURATIONS, OTHERS, prompts, replies, tiny

pytest.importorskip("triton")

from fastvlm.runtimes import triton_kernels as kernels
from fastvlm.runtimes.cuda_decoder import CudaDecoder, computes_on
from fastvlm.runtimes.runtime import cuda_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("llama", "qwen3", "gemma3")
SHAPES = [(16, 4, 2, 1, None), (24, 4, 4, 3, None), (64, 8, 1, 9, 7), (80, 6, 2, 2, 5)]
"""Size of a head, heads, heads of keys, width, window."""
START = (70, 33)
SLOTS = (2, 0)
LIMIT = 5
"""Tokens of a reply: an interpreter is slow."""

pytestmark = pytest.mark.skipif(not computes_on(DEVICE), reason="Triton interprets nothing here.")


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after another."""
    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    monkeypatch.setattr(kernels, "MAX_SPLITS", 4)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def norm(x: Tensor, weight: Tensor, *, unit_offset: bool) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    if unit_offset:
        return (wide * (1 + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms_are_the_models(dtype: torch.dtype, unit_offset: bool) -> None:
    x, added, weight = (random(*shape, dtype=dtype) for shape in ((2, 3, 100), (2, 3, 100), (100,)))
    same, found = kernels.rms_norm(x, weight, 1e-6, unit_offset=unit_offset)
    assert same is x
    torch.testing.assert_close(found, norm(x, weight, unit_offset=unit_offset))
    total, found = kernels.rms_norm(x, weight, 1e-6, added, unit_offset=unit_offset)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(found, norm(x + added, weight, unit_offset=unit_offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gated_parts_are_the_models(dtype: torch.dtype) -> None:
    gate, up = random(3, 1000, dtype=dtype), random(3, 1000, dtype=dtype)
    torch.testing.assert_close(kernels.gated(gate, up, "silu"), F.silu(gate) * up)
    expected = F.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(kernels.gated(gate, up, "gelu_tanh"), expected)


@pytest.mark.parametrize(("size", "heads", "kv_heads", "width", "window"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_in_slots(
    size: int, heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    queries = random(2, width, heads, size, dtype=dtype)
    keys, values = random(2, 2, width, kv_heads, size, dtype=dtype)
    cos, sin = random(2, 2, width, size, dtype=dtype)
    held = (
        random(3, kv_heads, 128, size, dtype=dtype),
        random(3, kv_heads, 128, size, dtype=dtype),
    )
    for tensor in held:
        for slot, start in zip(SLOTS, START, strict=True):
            tensor[slot, :, start:] = torch.nan
    rows = kernels.CacheRows(torch.tensor(SLOTS).to(DEVICE), torch.tensor(START).to(DEVICE))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]

    expected, new = rotated(queries), rotated(keys)
    kernels.rotate_and_store(queries, keys, values, (cos, sin), held, rows)
    torch.testing.assert_close(queries, expected)
    found = kernels.attention(queries, held, rows, 0.3, window)
    for row, (slot, start) in enumerate(zip(SLOTS, START, strict=True)):
        end = start + width
        torch.testing.assert_close(held[0][slot, :, start:end], new[row].transpose(0, 1))
        assert torch.equal(held[1][slot, :, start:end], values[row].transpose(0, 1))
        all_keys, all_values = (
            one[slot, :, :end].double().repeat_interleave(heads // kv_heads, 0) for one in held
        )
        places = torch.arange(end, device=DEVICE)
        here = places[start:, None]
        seen = (places <= here) & (places > here - (window or end))
        scores = 0.3 * queries[row].double().transpose(0, 1) @ all_keys.transpose(1, 2)
        exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ all_values
        close = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(
            found[row].double().transpose(0, 1), exact, atol=close, rtol=close
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str) -> None:
    model = tiny(CONFIGURATIONS[family]).to(DEVICE)
    decoder = cuda_decoder(model)
    given = prompts(decoder, (11, 4))
    found = replies(decoder, "block", given, LIMIT)
    model.generation_config.eos_token_id = None
    for inputs, reply in zip(given, found, strict=True):
        ids = torch.tensor([inputs.token_ids], device=DEVICE)
        out = model.generate(ids, do_sample=False, max_new_tokens=LIMIT)
        assert reply == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["autoregressive", "mlp", "layer-skip", "cascade"])
def test_every_strategy_gives_the_same_tokens(name: str, qwen: PreTrainedModel) -> None:
    split = split_decoder(qwen.to(DEVICE))
    given = prompts(split, (9,))
    wanted = replies(split, "autoregressive", given, LIMIT)
    assert replies(CudaDecoder(split), name, given, LIMIT) == wanted


def test_weights_that_change_are_followed(qwen: PreTrainedModel) -> None:
    model = tiny(qwen.config).to(DEVICE)
    decoder = CudaDecoder(split_decoder(model))
    given = prompts(decoder, (8,))
    before = replies(decoder, "autoregressive", given, LIMIT)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    after = replies(decoder, "autoregressive", given, LIMIT)
    assert before != after == replies(split_decoder(model), "autoregressive", given, LIMIT)


def test_a_model_that_is_cast_is_refused() -> None:
    model = tiny(CONFIGURATIONS["llama"]).to(DEVICE)
    decoder = CudaDecoder(split_decoder(model))
    model.double()
    with pytest.raises(InputError):
        replies(decoder, "autoregressive", prompts(decoder, (8,)), LIMIT)


@pytest.mark.parametrize("family", [*OTHERS, "gemma2"])
def test_another_form_is_refused(family: str) -> None:
    model = tiny(OTHERS.get(family) or CONFIGURATIONS[family]).to(DEVICE)
    with pytest.raises(InputError):
        cuda_decoder(model)
