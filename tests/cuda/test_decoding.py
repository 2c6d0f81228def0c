"""Decoding on a GPU gives the tokens of transformers' own generate on it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fastvlm
from fastvlm.functional.errors import InputError
from tests.cuda.reference import Reference, draft_for, placed, reference, replies_in
from tests.families import DEPTH, END, FAMILIES, Inputs

LIMIT = 14
KINDS = ("llama", "qwen3", "opt-350m", "llava", "fast-vlm", "qwen2.5-vl", "smolvlm", "blip2-t5")
FIXED: dict[str, Any] = {"num_speculative_tokens": 3, "confidence": 0.0}
STRATEGIES: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "early-exit": {"exit_layer": 1, **FIXED},
    "layer-skip": {"skipped_layers": (1, 2), **FIXED},
    "prompt-lookup": {"num_speculative_tokens": 4},
    "imitation": FIXED,
}


@cache
def case(family: str, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    model, inputs = FAMILIES[family]()
    return model.to(device, dtype), inputs


@cache
def expected(
    family: str, device: torch.device, dtype: torch.dtype, rows: int
) -> tuple[Inputs, Reference]:
    model, inputs = case(family, device, dtype)
    given = placed(inputs(rows), device, dtype)
    return given, reference(model, given, LIMIT, frozenset({END}))


def decode(
    model: PreTrainedModel, given: Inputs, name: str, *, seed: int = 0, **options: Any
) -> list[list[int]]:
    draft = draft_for(model, perfect=True) if name == "imitation" else None
    method = fastvlm.speculative(draft, strategy=name, **STRATEGIES[name])
    start = 1 if model.get_decoder().config.is_encoder_decoder else given["input_ids"].shape[1]
    options = {"do_sample": False, **options}
    torch.manual_seed(seed)
    out = model.generate(**given, max_new_tokens=LIMIT, custom_generate=method, **options)
    return replies_in(out, out.shape[1] - start, frozenset({END}))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", KINDS)
def test_greedy_tokens_equal_generates(
    family: str, name: str, rows: int, device: torch.device
) -> None:
    model, _ = case(family, device, torch.float32)
    given, known = expected(family, device, torch.float32, rows)
    known.assert_equal(decode(model, given, name))


@pytest.mark.parametrize("name", STRATEGIES)
def test_in_float64_no_call_is_close(name: str, device: torch.device) -> None:
    model, _ = case("llava", device, torch.float64)
    given, known = expected("llava", device, torch.float64, 4)
    assert decode(model, given, name) == known.replies


@pytest.mark.parametrize("name", STRATEGIES)
def test_logits_processors(name: str, device: torch.device) -> None:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    model, inputs = case("llama", device, torch.float64)
    given = placed(inputs(4), device, torch.float64)
    plain = model.generate(**given, max_new_tokens=LIMIT, do_sample=False, **options)
    steps = plain.shape[1] - given["input_ids"].shape[1]
    assert decode(model, given, name, **options) == replies_in(plain, steps, frozenset({END}))


@pytest.mark.parametrize("rows", [1, 4])
def test_sampled_tokens_are_the_same_for_every_strategy(rows: int, device: torch.device) -> None:
    model, inputs = case("llama", device, torch.float64)
    given = placed(inputs(rows), device, torch.float64)
    found = []
    for name in STRATEGIES:
        options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
        found.append(decode(model, given, name, seed=5, **options))
    assert all(replies == found[0] for replies in found)


def test_sampled_tokens_are_the_cpus(device: torch.device) -> None:
    found = []
    for where in (torch.device("cpu"), device):
        # Not of the cache: one model can't be in two places.
        model, inputs = FAMILIES["llama"]()
        model.to(where)
        given = placed(inputs(4), where, torch.float64)
        options = {"do_sample": True, "temperature": 0.9}
        found.append(decode(model, given, "early-exit", seed=5, **options))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["autoregressive", "early-exit", "imitation"])
def test_short_precisions(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model, _ = case("llama", device, dtype)
    given, known = expected("llama", device, dtype, 4)
    known.assert_equal(decode(model, given, name))


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl"])
@pytest.mark.parametrize("name", ["autoregressive", "early-exit"])
def test_weights_that_are_fetched_when_they_are_needed(
    family: str, name: str, device: torch.device
) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Offloading is accelerate's.")
    given, known = expected(family, device, torch.float32, 4)
    model = FAMILIES[family]()[0].float()
    accelerate.cpu_offload(model, execution_device=device)
    known.assert_equal(decode(model, given, name))


def test_a_model_of_which_a_part_lies_on_the_cpu(device: torch.device) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Splitting is accelerate's.")
    if device.type == "cpu":
        pytest.skip("A model on the CPU has no other part.")
    given, known = expected("llama", device, torch.float32, 4)
    model = FAMILIES["llama"]()[0].float()
    upper = {f"model.layers.{layer}": "cpu" for layer in range(2, DEPTH)}
    lower = {f"model.layers.{layer}": 0 for layer in range(2)}
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    model = accelerate.dispatch_model(model, {**others, **lower, **upper}, main_device=0)
    for name in ("autoregressive", "early-exit", "layer-skip"):
        known.assert_equal(decode(model, given, name))


def test_a_draft_on_another_device_is_refused_or_moved(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("On the CPU nothing lies elsewhere.")
    model, _ = case("llama", device, torch.float32)
    given, known = expected("llama", device, torch.float32, 1)
    elsewhere = draft_for(model).cpu()
    method = fastvlm.speculative(elsewhere)
    try:
        out: Tensor = model.generate(
            **given, max_new_tokens=LIMIT, do_sample=False, custom_generate=method
        )
    except InputError:
        return
    steps = out.shape[1] - given["input_ids"].shape[1]
    known.assert_equal(replies_in(out, steps, frozenset({END})))
