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
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fastvlm
from fastvlm.decoding import Autoregressive
from fastvlm.functional import products
from fastvlm.functional.packed import PackedLinear, available, pack
from fastvlm.functional.products import (
    SMALLEST_IN_16_BITS,
    SMALLEST_IN_32_BITS,
    HalfProduct,
    OneDnnProduct,
    ProductByRows,
    half_functions,
    half_scale,
)
from fastvlm.language import capture_decoder_inputs, split_decoder
from fastvlm.language.packed import pack_decoder
from tests.families import FAMILIES, replies
from tests.language.decoding import LIMIT, decode, pack_small, strategy

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


def of_kind(kind: str, *, bias: bool = True) -> nn.Linear:
    """A packed layer whose weights are in 32 bits, 32 of which 16 are zeros, or 16."""
    layer = linear(700, bias=bias, dtype=DTYPES.get(kind, torch.float32))
    with torch.no_grad():
        if kind in {"half", "scaled"}:
            layer.weight.copy_(layer.weight.bfloat16())
        if kind == "scaled":
            # In float16 as it is, most of it would be zeros.
            layer.weight.mul_(2.0**-22)
    pack([layer], PLENTY)
    assert isinstance(layer, PackedLinear)
    assert type(layer.packed.product) is KINDS[kind]
    return layer


DTYPES = {"both": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: dict[str, type[Any]] = {
    "float32": OneDnnProduct,
    "half": HalfProduct,
    "scaled": HalfProduct,
    "both": ProductByRows,
    "bfloat16": OneDnnProduct,
    "float16": HalfProduct,
}
SHAPES = [(1, 1), (1, 2), (1, 5), (3, 1), (2, 11), (1, 16), (4, 33), (7,)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_float64(
    kind: str, shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "half_gains", lambda: kind == "both")
    layer = of_kind(kind, bias=bias)
    x = torch.randn(*shape, WIDTH, dtype=layer.weight.dtype)
    exact = x.double() @ layer.weight.double().T
    if bias:
        exact = exact + layer.bias.double()
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == (*shape, 700)
    assert found.dtype == layer.weight.dtype
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[found.dtype]
    assert (found - exact).abs().max() < rounding * exact.abs().max()


@pytest.mark.parametrize("kind", ["half", "float16"])
@pytest.mark.parametrize("shape", [(256, 256), (512, 700), (1000, 300)])
def test_a_row_is_the_same_beside_any_others(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(4)
    weight = torch.randn(*shape).bfloat16().to(torch.half if kind == "float16" else torch.float32)
    product = products.product_of(weight)
    assert isinstance(product, HalfProduct)
    x = torch.randn(40, shape[1], dtype=weight.dtype)
    together = product(x, weight, None)
    for rows in (1, 2, 3, 5, 8, 14, 15, 16, 29, 33):
        assert torch.equal(product(x[-rows:], weight, None), together[-rows:])


def test_only_equal_values_are_held_in_half_of_the_bytes() -> None:
    torch.manual_seed(2)
    weight = torch.randn(300, 256)
    assert half_scale(weight) is None
    short = weight.bfloat16().float()
    assert half_scale(short) == 1
    _, exponent = torch.frexp(short.abs().amax())
    assert half_scale(short * 2.0**-30) == 2.0 ** (45 - int(exponent))
    assert half_scale(short * 2.0**30) is not None
    for row, value in ((0, 1 + 2.0**-20), (299, 2.0**60), (5, float("inf")), (5, float("nan"))):
        other = short.clone()
        other[row, 7] = value
        assert half_scale(other) is None
    # A row of small values among large ones.
    short[17] *= 2.0**-30
    assert half_scale(short) is None
    assert half_scale(torch.zeros(4, 4)) is None


def test_a_large_matrix_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_WEIGHTS", 1000)
    weight = torch.randn(300, 256).bfloat16().float()
    assert half_scale(weight) == 1
    weight[299, 255] = 1 + 2.0**-20
    assert half_scale(weight) is None


def test_without_fbgemm_matrices_are_packed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "half_functions", lambda: None)
    weight = torch.randn(512, 512).bfloat16().float()
    assert isinstance(products.product_of(weight), OneDnnProduct)
    assert not products.packs(torch.float16)


def test_both_of_torchs_ways_to_fbgemm_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [half_functions.__wrapped__()]
    monkeypatch.setattr(products, "DIRECT", "no such function")
    ways.append(half_functions.__wrapped__())
    assert ways[0] != ways[1]
    weight, x = torch.randn(512, 512).bfloat16().float(), torch.randn(6, 512)
    one, other = (HalfProduct(weight, 1, way)(x, weight, None) for way in ways)
    assert torch.equal(one, other)


def test_threads_share_large_matrices_alone_and_round_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "SMALLEST_FOR_THREADS", 512 * 512)
    weights = [torch.randn(size, 512).bfloat16().float() for size in (512, 256)]
    found = {}
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = [products.product_of(weight) for weight in weights]
    ways = [[one.multiply == half_functions().multiply for one in made] for made in found.values()]
    assert ways == [[True, True], [False, True]]
    for rows in (1, 2, 7, 33):
        x = torch.randn(rows, 512)
        for one, other, weight in zip(found[1], found[2], weights, strict=True):
            assert torch.equal(one(x, weight, None), other(x, weight, None))


def test_a_prompt_is_multiplied_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weight = torch.randn(256, 512).bfloat16().float()
    product = products.product_of(weight)
    prompt = torch.randn(2, products.PROMPT_POSITIONS + 1, 512)
    assert torch.equal(product(prompt, weight, None), F.linear(prompt, weight))
    half = products.product_of(weight.half())
    assert torch.equal(
        half(prompt.half(), weight.half(), None)[:, -9:],
        half(prompt.half()[:, -9:], weight.half(), None),
    )
    # A batch of drafts rounds as a single one, however many rows they are together.
    drafts = torch.randn(40, 9, 512)
    alone = torch.cat([product(draft, weight, None) for draft in drafts.split(1)])
    assert torch.equal(product(drafts, weight, None), alone)


@pytest.mark.parametrize("faster", [True, False])
def test_one_row_goes_the_faster_way(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_one_row_packed", {})
    monkeypatch.setattr(OneDnnProduct, "_is_faster", lambda *_: faster)
    layer, x = packed(linear()), torch.randn(1, WIDTH)
    monkeypatch.setattr(OneDnnProduct, "_is_faster", lambda *_: not faster)
    other = packed(linear())
    for one in (layer, other):
        one.packed.product.multiply = lambda *_: "packed"
    with torch.inference_mode():
        assert (layer(x) == "packed") is faster
        # Layers of a shape go one way.
        assert (other(x) == "packed") is faster
        assert layer(x.expand(2, -1)) == "packed"


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
    double, tiny = linear(dtype=torch.float64), linear(SMALLEST_IN_16_BITS // WIDTH - 1).bfloat16()
    small, offloaded = linear(SMALLEST_IN_32_BITS // WIDTH - 1), linear()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    changed, turned = linear(), linear()
    parametrize.register_parametrization(changed, "weight", nn.Identity())
    turned.weight = nn.Parameter(turned.weight.detach().T)
    assert pack([double, tiny, small, offloaded, changed, turned], PLENTY) == 0


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
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_seen(way: str, out: int, rows: int, mode: Any) -> None:
    torch.manual_seed(3)
    layer, x = nn.Linear(WIDTH, out), torch.randn(rows, WIDTH)
    if rows == 1:
        layer.weight.data.copy_(layer.weight.bfloat16())
    pack([layer], PLENTY)
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
    pack_small(monkeypatch)
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
    pack_small(monkeypatch)
    assert fastvlm.pack_decoder(model) > 0
    decoder = split_decoder(model)
    found = decode(decoder, strategy(name, decoder), prompts)
    assert [request.output_token_ids for request in found] == expected
    assert decode(decoder, Autoregressive(), prompts)[0].output_token_ids == expected[0]


def test_load_packs_as_much_as_it_is_told() -> None:
    vlm = fastvlm.load(runtime="torch")
    head = vlm.decoder.lm_head
    assert isinstance(head, PackedLinear)
    # The checkpoint is in bfloat16.
    assert isinstance(head.packed.product, HalfProduct)
    most = head.packed.product.nbytes - 1
    for packed_bytes in (0, most):
        vlm = fastvlm.load(runtime="torch", packed_bytes=packed_bytes)
        parts = vlm.model.modules()
        packed = [part for part in parts if isinstance(part, PackedLinear)]
        assert sum(part.packed.product.nbytes for part in packed) <= packed_bytes
