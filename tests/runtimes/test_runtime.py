"""Which runtime decodes a model."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

import fastvlm
from fastvlm.functional.errors import InputError
from fastvlm.runtimes import RuntimeOptions
from fastvlm_example import SCENE_PROMPT


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runtime": "tensorrt"}, "The runtimes are torch, onnx"),
        ({"runtime": "onnx", "quantize": "int2"}, "int8 or int4"),
    ],
)
def test_wrong_options(options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        RuntimeOptions(**options)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name="onnxruntime")
        return own(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
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
        assert without == fastvlm.load().generate(SCENE_PROMPT, **asked).token_ids
