"""The state of a decoder's weights: what changes it, and what it can look at."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastvlm.language.weights_state import weights_state
from tests.families import FAMILIES
from tests.quantised import quantise_linears

TOKENS = torch.tensor([[1, 2, 3, 4]])


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def adapter(rank: int = 4, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return peft.LoraConfig(r=rank, **options)


def adapted(model: Any, *, named: str = "default", **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    return peft.get_peft_model(model, adapter(**options), adapter_name=named).eval()


def stays(model: Any) -> Any:
    """Return the state, which a pass doesn't change."""
    state = weights_state(model)
    assert weights_state(model) == state
    assert hash(weights_state(model)) == hash(state)
    with torch.no_grad():
        model(TOKENS)
    with torch.inference_mode():
        assert weights_state(model) == state
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_known_of_every_family_and_a_pass_leaves_it(family: str) -> None:
    model, inputs = FAMILIES[family]()
    state = weights_state(model)
    model.generate(**inputs(1), max_new_tokens=2)
    assert weights_state(model) == state
    assert weights_state(copy.deepcopy(model)) != state


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


EDITS: dict[str, Callable[[Any], Any]] = {
    "a weight in place": lambda it: it.model.layers[1].mlp.up_proj.weight.mul_(2),
    "a weight's data": lambda it: it.model.layers[1].mlp.up_proj.weight.data.mul_(2),
    "a weight's data replaced": lambda it: setattr(
        it.model.norm.weight, "data", it.model.norm.weight + 1
    ),
    "a weight's data of low rank": lambda it: it.model.layers[0].self_attn.k_proj.weight.data.add_(
        torch.randn(32, 1) @ torch.randn(1, 64), alpha=1e-3
    ),
    "a norm's data": lambda it: it.model.layers[0].input_layernorm.weight.data.add_(1),
    "the embedding's data": lambda it: it.model.embed_tokens.weight.data.mul_(1.5),
    "the LM head's data": lambda it: it.lm_head.weight.data.mul_(1.5),
    "other values": lambda it: it.load_state_dict(
        {name: 2 * value for name, value in it.state_dict().items()}
    ),
    "other tensors": lambda it: it.load_state_dict(
        {name: 2 * value for name, value in it.state_dict().items()}, assign=True
    ),
    "a larger vocabulary": lambda it: it.resize_token_embeddings(100),
    "a precision": lambda it: it.to(torch.bfloat16),
    "a layer less": lambda it: it.model.layers.__delitem__(0),
    "another LM head": lambda it: setattr(it, "lm_head", nn.Linear(64, 96, bias=False)),
    "another layer": lambda it: it.model.layers.__setitem__(0, copy.deepcopy(it.model.layers[0])),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_changes_are_seen(edit: str, tied: bool) -> None:
    model = llama(tied=tied)
    state = stays(model)
    with torch.no_grad():
        EDITS[edit](model)
    assert stays(model) != state


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_of_training_is_seen(precision: torch.dtype) -> None:
    model = llama().to(precision)
    state = stays(model)
    step(model)
    assert stays(model) != state


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_seen(precision: torch.dtype) -> None:
    base = llama().to(precision)
    states = [stays(base)]
    model = adapted(base, named="one")
    states.append(stays(model))
    model.add_adapter("two", adapter(8))
    states.append(stays(model))
    model.set_adapter("two")
    states.append(stays(model))
    with model.disable_adapter():
        states.append(stays(model))
    assert stays(model) == states[3]
    for layer in model.modules():
        if hasattr(type(layer), "merged_adapters"):
            layer.scaling["two"] *= 2
    states.append(stays(model))
    model.merge_adapter()
    states.append(stays(model))
    model.unmerge_adapter()
    states.append(stays(model))
    model.delete_adapter("one")
    states.append(stays(model))
    assert weights_state(model.merge_and_unload()) not in states
    # The values that unmerging leaves may be rounded otherwise.
    del states[7]
    assert len(set(states)) == len(states)


def test_an_adapter_that_is_merged_at_once_is_seen() -> None:
    base = llama()
    state = stays(base)
    merged = adapted(base).merge_and_unload()
    assert merged is base
    assert stays(merged) != state


def test_an_adapter_that_is_taken_off_again_leaves_the_state() -> None:
    base = llama()
    state = stays(base)
    model = adapted(base)
    assert weights_state(model) == weights_state(base) != state
    assert stays(model.unload()) == state


def test_an_adapter_of_the_lm_head_and_modules_that_are_saved_with_it_are_seen() -> None:
    base = llama()
    state = stays(base)
    options = {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    model = adapted(base, **options)
    states = [state, stays(model)]
    with model.disable_adapter():
        states.append(stays(model))
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save.default.weight.data.mul_(2)
    states.append(stays(model))
    assert len(set(states)) == len(states)


def test_quantised_weights() -> None:
    model = llama()
    state = stays(model)
    quantise_linears(model)
    quantised = stays(model)
    assert quantised != state
    model.model.layers[0].mlp.up_proj.weight.codes.data.mul_(-1)
    assert stays(model) != quantised


def test_weights_in_buffers() -> None:
    class Codes(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("codes", (100 * layer.weight.detach()).char())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.codes / 100)

    model = llama()
    model.model.layers[0].mlp.up_proj = Codes(model.model.layers[0].mlp.up_proj)
    state = stays(model)
    model.model.layers[0].mlp.up_proj.codes.data.add_(1)
    assert stays(model) != state


def test_offloaded_weights() -> None:
    model = llama()
    state = stays(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    offloaded = stays(model)
    assert offloaded != state
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(weights_state(model)))
    stays(model)
    # Its weights are there while it is called.
    assert seen == [offloaded]


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = llama()
    assert weights_state(model) == weights_state(model)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model = llama()
        state = weights_state(model)
        assert weights_state(model) == state
        model.model.norm.weight.mul_(2)
        assert weights_state(model) != state


def test_transposed_and_empty_weights() -> None:
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    layer.register_parameter("none", nn.Parameter(torch.zeros(0)))
    state = stays(model)
    layer.weight.data.mul_(2)
    assert stays(model) != state


def test_no_numbers_equal_themselves() -> None:
    model = llama()
    model.model.norm.weight.data.fill_(torch.nan)
    stays(model)


def test_threads_may_ask_at_once() -> None:
    models = [llama(), adapted(llama())]
    states = [weights_state(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(weights_state, 25 * models)) == 25 * states


def test_a_model_is_not_kept() -> None:
    model = llama()
    weights_state(model)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None
