"""Small teachers of encoders, in torch and in ONNX, good ones and bad ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 96
FILE = Path(__file__)


class Colours(nn.Module):
    """Sees colours in places of 32 pixels, in features that it draws from them."""

    image_size = SIZE
    image_mean = (0.4, 0.5, 0.6)
    image_std = (0.2, 0.25, 0.5)

    def __init__(self, shape: str = "grid", classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.shape = shape
        self.mixing = nn.Parameter(torch.randn(7, 3, 1, 1, generator=generator))
        self.head = nn.Parameter(torch.randn(classes, 7, generator=generator))

    def forward(self, pixels: Tensor) -> Tensor | dict[str, Tensor]:
        grid = F.conv2d(F.avg_pool2d(pixels, 32), self.mixing.to(pixels.dtype)).tanh()
        tokens, whole = grid.flatten(2).transpose(1, 2), grid.mean((2, 3))
        summary = 2 * whole[:, None]
        features = {
            "grid": grid,
            "tokens": tokens,
            "with a class token": torch.cat((summary, tokens), 1),
            "vector": whole,
        }[self.shape]
        if self.head.shape[0] == 0:
            return features
        return {"features": features, "logits": whole @ self.head.to(pixels.dtype).T}


def grid() -> nn.Module:
    return Colours()


def tokens() -> nn.Module:
    return Colours("tokens", 0)


def class_token() -> nn.Module:
    return Colours("with a class token", 0)


def vector() -> nn.Module:
    return Colours("vector", 0)


class Bad(nn.Module):
    """Returns something else than features."""

    image_size, image_mean, image_std = 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, found: Any = None, **stated: Any) -> None:
        super().__init__()
        self.found = found
        for name, value in stated.items():
            setattr(self, name, value)

    def forward(self, pixels: Tensor) -> Any:
        return self.found(pixels) if callable(self.found) else self.found


def not_a_square() -> nn.Module:
    return Bad(lambda pixels: pixels.new_zeros(len(pixels), 7, 4))


def one_for_all() -> nn.Module:
    return Bad(torch.zeros(1, 4))


def no_numbers() -> nn.Module:
    return Bad(lambda pixels: pixels.flatten(1)[:, :4] / 0 * 0)


def unnamed() -> nn.Module:
    return Bad({"last": torch.zeros(2, 4)})


def text() -> nn.Module:
    return Bad("a cat")


def fails() -> nn.Module:
    return Bad(lambda pixels: pixels @ torch.zeros(3, 3))


def silent() -> nn.Module:
    return Bad(lambda pixels: pixels.flatten(1)[:, :4], image_mean=None)


def four_colours() -> nn.Module:
    return Bad(lambda pixels: pixels.flatten(1)[:, :4], image_mean=(0.1, 0.2, 0.3, 0.4))


def grey() -> nn.Module:
    return Bad(lambda pixels: pixels.flatten(1)[:, :4], image_std=(0.5, 0.0, 0.5))


def raises() -> nn.Module:
    raise RuntimeError("its weights are missing")


def number() -> Any:
    return 7


def save_onnx(
    file: Path, *, batch: int | str = "batch", size: int | str = SIZE, stated: Mapping[str, str]
) -> Path:
    """Write `grid` as ONNX, node by node."""
    from onnx import TensorProto, helper, numpy_helper, save

    module = Colours()
    mixing = numpy_helper.from_array(module.mixing.detach().numpy(), "mixing")
    head = numpy_helper.from_array(module.head.detach().numpy().T.copy(), "head")
    nodes = [
        helper.make_node(
            "AveragePool", ["pixels"], ["places"], kernel_shape=[32, 32], strides=[32, 32]
        ),
        helper.make_node("Conv", ["places", "mixing"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["whole"]),
        helper.make_node("MatMul", ["whole", "head"], ["logits"]),
    ]
    shapes = {"features": [batch, 7, "rows", "columns"], "logits": [batch, 5]}
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [mixing, head],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    helper.set_model_props(model, dict(stated))
    save(model, file)
    return file
