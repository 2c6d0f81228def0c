"""Names of FastViTHD's weights: ours, timm's (`fastvit_mci3`) and Apple's (MobileCLIP).

The tensors are the same; only the names of the layers differ. timm's head and Apple's are not part
of the encoder and have no name here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Rules = Sequence[tuple[re.Pattern[str], str]]


def _compiled(rules: dict[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules.items()]


_FROM_TIMM = _compiled(
    {
        r"\.downsample\.proj\.0\.": ".downsample.large.",
        r"\.downsample\.proj\.1\.": ".downsample.point.",
        r"\.pos_emb\.(pos_enc|reparam_conv)\.": ".pos_emb.conv.",
        r"\.(conv_kxk\.0|large_conv)\.": ".conv.",
        r"\.(conv_scale|small_conv)\.": ".branch.",
        r"\.reparam_conv\.": ".reparam.",
    }
)

_TO_TIMM = _compiled(
    {
        r"\.downsample\.large\.conv\.": ".downsample.proj.0.large_conv.",
        r"\.downsample\.large\.branch\.": ".downsample.proj.0.small_conv.",
        r"\.downsample\.large\.": ".downsample.proj.0.",
        r"\.downsample\.point\.": ".downsample.proj.1.",
        r"\.reparam\.": ".reparam_conv.",
        r"^(stem\.\d+|.*\.downsample\.proj\.1|.*\.token_mixer\.mixer|final_conv)\.conv\.": (
            r"\1.conv_kxk.0."
        ),
        r"\.branch\.": ".conv_scale.",
    }
)

_FROM_APPLE = _compiled(
    {
        r"^patch_embed\.": "stem.",
        r"^conv_exp\.": "final_conv.",
        r"\.proj\.0\.(?=lkb_|small_conv)": ".large.",
        r"\.proj\.1\.(?=rbr_|reparam_conv)": ".point.",
        r"(?<=pos_emb)\.(pe|reparam_conv)\.": ".conv.",
        r"\.(rbr_conv\.0|lkb_origin)\.": ".conv.",
        r"\.(rbr_scale|small_conv)\.": ".branch.",
        r"\.rbr_skip\.": ".identity.",
        r"\.(lkb_reparam|reparam_conv)\.": ".reparam.",
        r"\.convffn\.": ".mlp.",
        r"\.se\.reduce\.": ".se.fc1.",
        r"\.se\.expand\.": ".se.fc2.",
        r"(\.layer_scale(_[12])?)$": r"\1.gamma",
    }
)

_APPLE_NETWORK_MODULES = (
    "stages.0.blocks",
    "stages.1.downsample",
    "stages.1.blocks",
    "stages.2.downsample",
    "stages.2.blocks",
    "stages.3.downsample",
    "stages.3.pos_emb",
    "stages.3.blocks",
    "stages.4.downsample",
    "stages.4.pos_emb",
    "stages.4.blocks",
)
"""The modules of Apple's flat list `network`, in order."""


def from_timm(name: str) -> str | None:
    """Return fastvlm's name of one of timm's weights; None for its classifier."""
    return None if name.startswith("head.") else _renamed(name, _FROM_TIMM)


def to_timm(name: str, form: str) -> str:
    """Return timm's name of one of fastvlm's weights.

    Args:
        name: fastvlm's name.
        form: `training` or `reparameterized`; timm's names of position encodings differ between
            them.
    """
    conv = "pos_enc" if form == "training" else "reparam_conv"
    return _renamed(name.replace(".pos_emb.conv.", f".pos_emb.{conv}."), _TO_TIMM)


def from_apple(name: str) -> str | None:
    """Return fastvlm's name of one of Apple's weights; None for CLIP's projection."""
    if name.startswith("head."):
        return None
    if match := re.match(r"network\.(\d+)\.", name):
        index = int(match[1])
        if index < len(_APPLE_NETWORK_MODULES):
            name = f"{_APPLE_NETWORK_MODULES[index]}.{name[match.end() :]}"
    return _renamed(name, _FROM_APPLE)


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name
