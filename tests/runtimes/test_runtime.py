"""Which runtime decodes a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import fastvlm
from fastvlm.decoding import Autoregressive, SelfSpeculative
from fastvlm.drafting import FixedLength
from fastvlm.functional.errors import InputError
from fastvlm.runtimes import RuntimeOptions, decoder_of, runtime
from fastvlm_example import SCENE_PROMPT
from tests.language.decoding import decode, network
from tests.runtimes.conftest import CONFIGURATIONS, OTHERS, prompts, tiny


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runtime": "tensorrt"}, "The runtimes are torch, onnx"),
        ({"runtime": "onnx", "quantize": "int2"}, "int8 or int4"),
        ({"runtime": "cuda", "quantize": "int8"}, "quantize"),
    ],
)
def test_wrong_options(options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        RuntimeOptions(**options)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runtime.find_spec
    monkeypatch.setattr(
        runtime, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    with pytest.raises(InputError, match="needs onnxruntime: pip install"):
        RuntimeOptions("onnx")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_example_model(quantize: str | None) -> None:
    pytest.importorskip("onnxruntime")
    vlm = fastvlm.load(runtime="onnx", quantize=quantize)
    asked: dict[str, Any] = {"max_new_tokens": 12}
    with_draft, without = (
        vlm.generate(SCENE_PROMPT, strategy=name, **asked).token_ids
        for name in ("imitation", "autoregressive")
    )
    assert with_draft == without
    if quantize is None:
        assert without == fastvlm.load(runtime="torch").generate(SCENE_PROMPT, **asked).token_ids


def test_a_small_model_is_computed_by_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny(CONFIGURATIONS["qwen2"])

    def chosen(model: PreTrainedModel, **options: Any) -> str:
        return decoder_of(model, None, RuntimeOptions(**options)).runtime

    assert chosen(model) == "onnx"
    assert chosen(model, runtime="torch") == "torch"
    # No room for a second copy of its weights, another precision, another form.
    assert chosen(model, packed_bytes=0) == "torch"
    assert chosen(tiny(CONFIGURATIONS["qwen2"], torch.bfloat16)) == "torch"
    assert chosen(tiny(OTHERS["gpt2"])) == "torch"
    monkeypatch.setattr(runtime, "SMALL", 1000)
    assert chosen(model) == "torch"
    # Fewer bits are faster there whatever the size.
    assert chosen(model, quantize="int8") == "onnx"
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "find_spec", lambda _: None)
    assert chosen(model) == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_drafts_beside_torch_are_onnx_runtimes_where_it_can(dtype: torch.dtype) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny(CONFIGURATIONS["gemma3"], dtype)
    decoder = decoder_of(model, None, RuntimeOptions("torch"))
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    several = SelfSpeculative(decoder, 1, drafts, FixedLength(3))
    given = prompts(decoder, (9,))
    [plain], [made] = (
        decode(decoder, one, given, 20, ends=()) for one in (Autoregressive(), several)
    )
    # Passes of several positions round otherwise in 16 bits.
    assert made.output_token_ids == plain.output_token_ids or dtype == torch.bfloat16
    assert bool(decoder.prepared) == (dtype != torch.float64)
    # In another precision there may be some, or none any more.
    model.to(torch.float32 if dtype == torch.float64 else torch.float64)
    given = prompts(decoder, (9,))
    before = decoder.prepared
    decode(decoder, several, given, 20, ends=())
    assert (decoder.prepared > before) == (dtype == torch.float64)


def test_drafts_of_a_form_that_onnx_runtime_does_not_know_are_torchs() -> None:
    model = tiny(OTHERS["mixtral"])
    decoder = decoder_of(model, None, RuntimeOptions())
    several = SelfSpeculative(
        decoder, 1, network(decoder, "block", vocabulary=range(3, 90)), FixedLength(3)
    )
    [made] = decode(decoder, several, prompts(decoder, (9,)), 20, ends=())
    assert sum(made.proposed) > 0
    assert decoder.prepared == 0


def test_nothing_drafts_ahead_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(CONFIGURATIONS["qwen2"])
    monkeypatch.setattr(runtime, "find_spec", lambda _: None)
    assert decoder_of(model, None, RuntimeOptions()).ahead is None


def test_a_model_that_is_cast_is_computed_by_torch_unless_onnx_runtime_is_required() -> None:
    pytest.importorskip("onnxruntime")
    vlm, required = fastvlm.load(), fastvlm.load(runtime="onnx")
    asked: dict[str, Any] = {"max_new_tokens": 8, "strategy": "imitation"}
    known = vlm.generate(SCENE_PROMPT, **asked).token_ids
    for one in (vlm, required):
        one.model.to(torch.float64)
    assert vlm.generate(SCENE_PROMPT, **asked).token_ids == known
    assert vlm.decoder.runtime == "torch"
    with pytest.raises(InputError, match="computes in float32"):
        required.generate(SCENE_PROMPT, **asked)
    vlm.model.to(torch.float32)
    assert vlm.generate(SCENE_PROMPT, **asked).token_ids == known
    assert vlm.decoder.runtime == "onnx"


def test_a_model_in_few_bits_is_never_computed_in_more() -> None:
    pytest.importorskip("onnxruntime")
    vlm = fastvlm.load(quantize="int8")
    assert vlm.decoder.runtime == "onnx"
    vlm.model.to(torch.float64)
    with pytest.raises(InputError, match="computes in float32"):
        vlm.generate(SCENE_PROMPT, max_new_tokens=8)


def test_a_large_draft_is_not_copied_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny(CONFIGURATIONS["qwen2"])
    decoder = decoder_of(model, None, RuntimeOptions("torch"))
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    several = SelfSpeculative(decoder, 1, drafts, FixedLength(3))
    monkeypatch.setattr("fastvlm.runtimes.draft_size.LARGEST_DRAFT", 1000)
    [made] = decode(decoder, several, prompts(decoder, (9,)), 20, ends=())
    assert sum(made.proposed) > 0
    assert decoder.prepared == 0


def test_parts_that_are_exchanged_for_unknown_ones_are_drafted_with_by_torch() -> None:
    pytest.importorskip("onnxruntime")
    model = tiny(CONFIGURATIONS["qwen2"])
    decoder = decoder_of(model, None, RuntimeOptions("torch"))
    drafts = network(decoder, "block", vocabulary=range(3, 90))
    several = SelfSpeculative(decoder, 1, drafts, FixedLength(3))
    given = prompts(decoder, (9,))
    decode(decoder, several, given, 20, ends=())
    before = decoder.prepared
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    [plain], [made] = (
        decode(decoder, one, given, 20, ends=()) for one in (Autoregressive(), several)
    )
    assert before > 0 == decoder.prepared
    assert made.output_token_ids == plain.output_token_ids
    assert sum(made.proposed) > 0
