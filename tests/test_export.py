"""Encoder and projector in ONNX Runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fastvlm import export
from fastvlm.export import VisualFeatures, export_onnx
from fastvlm.functional.errors import InputError
from tests.models import small_vlm


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the encoder of a small model, which takes most of a minute to export."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    worst = export_onnx(small_vlm(torch.float32), folder / "encoder.onnx")
    assert worst < export.ONNX_TOLERANCES[torch.float32]
    return folder


def test_onnx_computes_the_same_at_any_size(exported: Path) -> None:
    vlm = small_vlm(torch.float32)
    file = exported / "encoder.onnx"
    assert [path.name for path in exported.iterdir()] == [file.name]
    session = onnxruntime.InferenceSession(file)
    for batch, height, width in ((1, 64, 64), (3, 128, 320), (2, 256, 192)):
        pixels = torch.rand(batch, 3, height, width)
        [found] = session.run(["visual_features"], {"pixel_values": pixels.numpy()})
        with torch.inference_mode():
            expected = vlm.model.get_image_features(pixels).pooler_output
        assert found.shape == (batch, height // 64 * width // 64, vlm.decoder.width)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_what_differs_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export.ONNX_TOLERANCES, torch.float32, -1.0)

    class Program:
        """The program that was exported before."""

        @staticmethod
        def save(file: Path) -> None:
            shutil.copy(exported / "encoder.onnx", file)

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program)
    with pytest.raises(InputError, match="was not written"):
        export_onnx(small_vlm(torch.float32), tmp_path / "encoder.onnx")
    assert not list(tmp_path.iterdir())


def test_the_features_are_the_models_own() -> None:
    vlm = small_vlm()
    pixels = torch.rand(2, 3, 64, 128, dtype=torch.float64)
    expected = vlm.model.get_image_features(pixels).pooler_output
    assert VisualFeatures(vlm)(pixels).equal(expected)
