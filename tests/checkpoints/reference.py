"""timm's FastViTHD: its names, weights drawn from them, and what it computes.

Run as a script, in an environment with timm, this file writes `fixtures/timm.json.gz`: names and
shapes of `fastvit_mci3` in both forms, and the output of a small one whose weights `drawn` makes.
With it the same check runs where there is no timm.

Apple's own encoder (MobileCLIP) is published as code alone; `apple_name` says what it calls a
weight of timm's. timm's function that reads MobileCLIP's checkpoints is the judge of it
(`test_timm.py`).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FIXTURE = Path(__file__).parent / "fixtures" / "timm.json.gz"
SMALL = {"depths": (2, 1, 1, 2, 1), "widths": (8, 16, 32, 32, 64)}
SMALL_PIXELS = (1, 3, 128, 192)
FORMS = ("training", "reparameterized")
NETWORK = {
    "stages.0.blocks": 0,
    "stages.1.downsample": 1,
    "stages.1.blocks": 2,
    "stages.2.downsample": 3,
    "stages.2.blocks": 4,
    "stages.3.downsample": 5,
    "stages.3.pos_emb": 6,
    "stages.3.blocks": 7,
    "stages.4.downsample": 8,
    "stages.4.pos_emb": 9,
    "stages.4.blocks": 10,
}


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a weight that its name decides, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("running_var"):
        return 0.5 + 1.5 * uniform
    if name.endswith(".gamma"):
        return 0.3 + 0.6 * uniform
    if name.endswith(".weight") and len(shape) == 1:
        return 0.5 + uniform
    normal = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * normal
    return normal * normal[0].numel() ** -0.5


def all_drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a weight for every name."""
    return {name: drawn(name, tuple(shape)) for name, shape in shapes.items()}


def pixels(shape: tuple[int, ...]) -> Tensor:
    """Return images in [0, 1] that their size decides."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator)


def apple_name(name: str) -> str:
    """Return what Apple calls one of timm's weights of a FastViTHD."""
    if match := re.match(r"(stages\.\d\.\w+)\.(?:proj\.)?", name):
        part = match[1]
        rest = name[len(part) + 1 :]
        name = f"network.{NETWORK[part]}.{rest}"
        if part.endswith("pos_emb"):
            return name.replace("pos_enc", "pe")
    if re.search(r"network\.\d+\.proj\.0\.", name):
        return name.replace("large_conv", "lkb_origin").replace("reparam_conv", "lkb_reparam")
    for theirs, apples in (
        ("stem.", "patch_embed."),
        ("final_conv.", "conv_exp."),
        ("conv_kxk.", "rbr_conv."),
        ("conv_scale.", "rbr_scale."),
        ("identity.", "rbr_skip."),
        (".mlp.", ".convffn."),
        (".se.fc1.", ".se.reduce."),
        (".se.fc2.", ".se.expand."),
    ):
        name = name.replace(theirs, apples)
    return re.sub(r"(layer_scale(_\d)?)\.gamma$", r"\1", name)


def read_fixture() -> dict[str, Any]:
    """Return what this file wrote."""
    with gzip.open(FIXTURE, "rt", encoding="utf-8") as file:
        return json.load(file)


def timm_encoder(form: str, *, small: bool = False, device: str = "cpu") -> nn.Module:
    """Return timm's encoder without its head, in evaluation mode."""
    from timm.layers import LayerNorm2d
    from timm.models.fastvit import FastVit, RepConditionalPosEnc

    depths, widths = (
        (SMALL["depths"], SMALL["widths"])
        if small
        else ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536))
    )
    position = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    # timm's own row `fastvit_mci3`, but for the size; `test_timm.py` compares the two.
    return FastVit(
        layers=depths,
        embed_dims=widths,
        mlp_ratios=(4,) * 5,
        se_downsamples=(False,) * 5,
        downsamples=(False, True, True, True, True),
        pos_embs=(None, None, None, position, position),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention", "attention"),
        lkc_use_act=True,
        norm_layer=partial(LayerNorm2d, eps=1e-5),
        stem_use_scale_branch=False,
        num_classes=0,
        inference_mode=form == "reparameterized",
        device=device,
    ).eval()


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """Return the names and shapes of a module's weights."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@torch.no_grad()
def computed(form: str) -> Tensor:
    """Return what timm's small encoder makes of `pixels(SMALL_PIXELS)`, its weights `drawn`."""
    encoder = timm_encoder(form, small=True)
    encoder.load_state_dict(all_drawn(shapes_of(encoder)))
    return encoder.forward_features(pixels(SMALL_PIXELS))


def main() -> None:
    """Write the fixture."""
    made = {
        form: {
            "released": shapes_of(timm_encoder(form, device="meta")),
            "small": shapes_of(timm_encoder(form, small=True)),
            "output": [round(value, 6) for value in computed(form).flatten().tolist()],
        }
        for form in FORMS
    }
    FIXTURE.parent.mkdir(exist_ok=True)
    with FIXTURE.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.write(json.dumps(made).encode())


if __name__ == "__main__":
    main()
