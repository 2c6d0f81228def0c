"""Export of encoder and projector to ONNX, for runtimes without Python."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.functional.errors import InputError
from fastvlm.functional.files import written_file
from fastvlm.vision.configuration import REDUCTION
from fastvlm.vlm import VisionLanguageModel

ONNX_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05}
"""Maximum differences of ONNX Runtime, as a share of the features' standard deviation."""
COMPARED_GRIDS = ((2, 2), (3, 2), (1, 4), (4, 4))
"""Rows and columns of visual tokens of the images that outputs are compared on."""


class VisualFeatures(nn.Module):
    """Encoder and projector: images to visual tokens, the decoder's inputs in place of an image."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        # Which parts a composite model has is its class's matter.
        inner: Any = vlm.model.base_model
        self.vision_tower, self.projector = inner.vision_tower, inner.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: (batch, 3, height, width) in [0, 1], height and width multiples of 64.

        Returns:
            (batch, height / 64 * width / 64, d_model).
        """
        states = self.vision_tower(pixel_values).last_hidden_state
        return self.projector(states.flatten(2).transpose(1, 2))


def export_onnx(vlm: VisionLanguageModel, file: Path) -> float:
    """Write encoder and projector as ONNX, run them in ONNX Runtime, and compare.

    Batch, height and width are free; height and width in steps of 64 pixels.

    Args:
        vlm: The model, in float32 or float16.
        file: The file; weights of more than 2 GB lie beside it.

    Returns:
        The largest difference of a feature, as a share of the features' standard deviation.

    Raises:
        InputError: onnx, onnxscript or onnxruntime is not installed, the model is in another
            precision, or the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise InputError(f"The export needs {error.name}: pip install 'fastvlm[onnx]'.") from error
    device, dtype = vlm.decoder.device_and_dtype()
    if dtype not in ONNX_TOLERANCES:
        raise InputError(f"The export takes a model in float32 or float16; this one has {dtype}.")
    module, tolerance = VisualFeatures(vlm).eval(), ONNX_TOLERANCES[dtype]
    # One image alone would make its dimension of 1 a constant, and so would a square.
    example = torch.rand(2, 3, 3 * REDUCTION, 2 * REDUCTION, dtype=dtype, device=device)
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    shapes = {"pixel_values": {0: batch, 2: REDUCTION * rows, 3: REDUCTION * columns}}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            input_names=["pixel_values"],
            output_names=["visual_features"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    with written_file(file) as beside:
        program.save(beside)
        session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
        worst = max(_difference(session, module, example, *grid) for grid in COMPARED_GRIDS)
        if worst > tolerance:
            raise InputError(
                f"ONNX Runtime's features differ by {worst:.1e} of their standard deviation, more"
                f" than {tolerance:.0e}; {file} was not written."
            )
    return worst


@torch.inference_mode()
def _difference(session: Any, module: nn.Module, like: Tensor, rows: int, columns: int) -> float:
    pixels = torch.rand(1, 3, rows * REDUCTION, columns * REDUCTION, dtype=like.dtype)
    [found] = session.run(None, {"pixel_values": pixels.numpy()})
    expected = module(pixels.to(like.device)).cpu().float()
    return float((torch.from_numpy(found).float() - expected).abs().max() / expected.std())
