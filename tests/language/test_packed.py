"""Packed weights: the same products, told from float64's, and what ends them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fastvlm
from fastvlm.decoding import Autoregressive
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.language.packed import SMALLEST, PackedLinear, available, pack, pack_decoder
from tests.families import FAMILIES, replies
from tests.language.decoding import LIMIT, decode, strategy

WIDTH = 512
PLENTY = 2**30

pytestmark = pytest.mark.skipif(not available(), reason="this CPU packs no weights")


def linear(out: int = WIDTH, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, out, bias=bias, dtype=dtype)


def packed(layer: nn.Linear) -> nn.Linear:
    assert pack([layer], PLENTY) == layer.weight.nbytes
    assert isinstance(layer, PackedLinear)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 5), (3, 1), (2, 11), (1, 16), (4, 33), (7,)])
def test_products_are_those_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    layer = packed(linear(700, bias=bias))
    x = torch.randn(*shape, WIDTH)
    exact = x.double() @ layer.weight.double().T
    if bias:
        exact = exact + layer.bias.double()
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == (*shape, 700)
    assert (found - exact).abs().max() < 1e-5


def test_rows_that_lie_apart_in_memory() -> None:
    layer, x = packed(linear()), torch.randn(3, 8, WIDTH)[:, 2:6]
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.contiguous()))


def test_gradients_are_the_ordinary_ones() -> None:
    plain, layer, x = linear(), packed(linear()), torch.randn(5, WIDTH)
    for one in (plain, layer):
        one(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, layer.weight.grad)


def test_autocast_is_the_ordinary_one() -> None:
    plain, layer, x = linear(), packed(linear()), torch.randn(5, WIDTH)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, plain(x))


def test_only_what_gains_is_packed() -> None:
    short, double = linear(dtype=torch.bfloat16), linear(dtype=torch.float64)
    small, offloaded = linear(SMALLEST // WIDTH - 1), linear()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    changed, turned = linear(), linear()
    parametrize.register_parametrization(changed, "weight", nn.Identity())
    turned.weight = nn.Parameter(turned.weight.detach().T)
    assert pack([short, double, small, offloaded, changed, turned], PLENTY) == 0


def test_elsewhere_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    for capability, onednn in (("DEFAULT", True), ("SVE256", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda it=onednn: it)
        assert pack([layer], PLENTY) == 0
    assert type(layer) is nn.Linear


def test_memory_is_bounded_and_nothing_is_packed_twice() -> None:
    layers = [linear() for _ in range(4)]
    size = layers[0].weight.nbytes
    assert pack(layers, 2 * size + 1) == 2 * size
    assert [isinstance(layer, PackedLinear) for layer in layers] == [True, True, False, False]
    assert pack(layers, PLENTY) == 2 * size
    assert pack([nn.Sequential(*layers)], PLENTY) == 0


def test_copies_are_ordinary_layers() -> None:
    layer, x = packed(linear()), torch.randn(1, WIDTH)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is nn.Linear
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(other(x), layer(x))
    assert layer.state_dict().keys() == linear().state_dict().keys()


WAYS: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
    "its data replaced": lambda layer: setattr(layer.weight, "data", 2 * layer.weight),
    "its data in place": lambda layer: layer.weight.data.mul_(2),
    "its data overwritten": lambda layer: layer.weight.data.copy_(layer.weight + 1),
    "one low rank": lambda layer: layer.weight.data.add_(
        torch.randn(layer.out_features, 1) @ torch.randn(1, WIDTH), alpha=1e-4
    ),
    "half of its rows": lambda layer: layer.weight.data[::2].add_(1e-3),
    "half of its columns": lambda layer: layer.weight.data[:, 1::2].add_(1e-3),
    "its last quarter": lambda layer: layer.weight.data[-layer.out_features // 4 :].zero_(),
    "loaded": lambda layer: layer.load_state_dict(linear(layer.out_features).state_dict()),
    "loaded in place of it": lambda layer: layer.load_state_dict(
        linear(layer.out_features).state_dict(), assign=True
    ),
    "moved": lambda layer: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("out", [WIDTH, 700, 2048])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_seen(way: str, out: int, mode: Any) -> None:
    torch.manual_seed(3)
    other = nn.Linear(WIDTH, out)
    layer, x = packed(other), torch.randn(4, WIDTH)
    with mode():
        layer(x)
        assert isinstance(layer, PackedLinear)
        WAYS[way](layer)
        x = x.to(layer.weight.dtype)
        for _ in range(2):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert type(layer) is nn.Linear


def small_llama() -> PreTrainedModel:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def with_adapter(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    config.init_lora_weights = False
    return peft.get_peft_model(model, config).eval()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A packed model, and the same one as it was."""
    monkeypatch.setattr("fastvlm.language.packed.SMALLEST", 1)
    model = small_llama()
    plain = copy.deepcopy(model)
    assert pack_decoder(model) > 0
    return model, plain


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(24).reshape(2, 12)).logits


def test_merged_adapters_are_seen(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, plain = pair
    before = logits(plain)
    torch.testing.assert_close(logits(model), before)
    adapted, same = map(with_adapter, pair)
    for step in ("attach", "merge_adapter", "unmerge_adapter"):
        if step != "attach":
            getattr(adapted, step)()
            getattr(same, step)()
        torch.testing.assert_close(logits(adapted), logits(same), atol=1e-4, rtol=1e-4)
    assert (logits(same) - before).abs().max() > 0.1
    merged, other = adapted.merge_and_unload(), same.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(other), atol=1e-4, rtol=1e-4)
    tokens = torch.tensor([[1, 2, 3]])
    found, expected = (
        one.generate(tokens, max_new_tokens=12, do_sample=False) for one in (merged, other)
    )
    assert torch.equal(found, expected)


def test_an_adapter_is_merged_at_once(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    merged, same = (with_adapter(model).merge_and_unload() for model in pair)
    torch.testing.assert_close(logits(merged), logits(same), atol=1e-4, rtol=1e-4)
    assert isinstance(merged.model.layers[0].self_attn.o_proj, PackedLinear)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("seed", range(4))
def test_threads_may_call_while_weights_change(
    seed: int, pair: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    model, plain = pair
    adapted, same = with_adapter(model), with_adapter(plain)
    expected, stop = [logits(same)], Event()
    same.merge_adapter()
    expected.append(logits(same))

    def call(_: int) -> list[Tensor]:
        found = []
        while not stop.is_set():
            found.append(logits(adapted))
        return [*found, logits(adapted)]

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, number) for number in range(4)]
        stop.wait(0.02 * seed)
        with torch.no_grad():
            for layer in adapted.modules():
                if isinstance(layer, PackedLinear):
                    # Found changed, though its values stay.
                    layer.weight.mul_(1)
        stop.wait(0.05)
        stop.set()
        for one in calls:
            for found in one.result():
                torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected[1], atol=1e-4, rtol=1e-4)


def test_threads_may_call_while_a_layer_becomes_an_ordinary_one() -> None:
    plain, x = linear(), torch.randn(4, WIDTH)
    with torch.inference_mode():
        expected = plain(x)

    def call(layer: nn.Linear) -> None:
        with torch.inference_mode():
            for _ in range(20):
                torch.testing.assert_close(layer(x), expected)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            layer = packed(copy.deepcopy(plain))
            calls = [pool.submit(call, layer) for _ in range(4)]
            with torch.no_grad():
                layer.weight.mul_(1)
            for one in calls:
                one.result()
            call(layer)
            assert type(layer) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl", "blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("name", ["autoregressive", "prompt-lookup", "block"])
def test_tokens_are_those_of_generate(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = FAMILIES[family]()
    model.float()
    given = {
        key: value.float() if value.is_floating_point() else value
        for key, value in inputs(4).items()
    }
    expected = replies(model, given, LIMIT)
    prompts = capture_decoder_inputs(model, given)
    # The models of the tests are small.
    monkeypatch.setattr("fastvlm.language.packed.SMALLEST", 1)
    assert fastvlm.pack_decoder(model) > 0
    decoder = split_decoder(model)
    found = decode(decoder, strategy(name, decoder), prompts)
    assert [request.output_token_ids for request in found] == expected
    assert decode(decoder, Autoregressive(), prompts)[0].output_token_ids == expected[0]


def test_load_packs_as_much_as_it_is_told() -> None:
    vlm = fastvlm.load()
    head = vlm.decoder.lm_head
    assert isinstance(head, PackedLinear)
    most = head.weight.nbytes - 1
    for packed_bytes in (0, most):
        parts = fastvlm.load(packed_bytes=packed_bytes).model.modules()
        packed = [part for part in parts if isinstance(part, PackedLinear)]
        assert sum(part.weight.nbytes for part in packed) <= packed_bytes
