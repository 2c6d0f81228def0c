"""Every weight of timm's and of Apple's encoder has its place in ours, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvlm.checkpoints.keys import from_apple, from_timm, to_timm
from fastvlm.vision import FastViTHD, FastViTHDConfig
from tests.checkpoints.reference import (
    FORMS,
    SMALL,
    SMALL_PIXELS,
    all_drawn,
    apple_name,
    pixels,
    read_fixture,
)


@pytest.fixture(scope="module")
def timm() -> dict[str, Any]:
    return read_fixture()


@pytest.mark.parametrize("form", FORMS)
def test_every_name_of_the_released_encoder(timm: dict[str, Any], form: str) -> None:
    with torch.device("meta"):
        ours = FastViTHD(FastViTHDConfig.variant("fastvithd", form=form)).state_dict()
    theirs = timm[form]["released"]
    wanted = {name: list(tensor.shape) for name, tensor in ours.items()}
    assert {from_timm(name): shape for name, shape in theirs.items()} == wanted
    assert {from_apple(apple_name(name)): shape for name, shape in theirs.items()} == wanted
    assert [to_timm(name, form) for name in ours] == [
        name for mine in ours for name in theirs if from_timm(name) == mine
    ]


def test_heads_have_no_place() -> None:
    assert from_timm("head.fc.weight") is None
    assert from_apple("head.proj") is None


def test_an_unknown_name_stays_what_it_is() -> None:
    assert from_apple("network.11.0.weight") == "network.11.0.weight"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["timm", "apple"])
def test_the_same_weights_compute_the_same(timm: dict[str, Any], form: str, layout: str) -> None:
    encoder = FastViTHD(FastViTHDConfig(**SMALL, form=form)).eval()
    weights = {
        from_timm(name) if layout == "timm" else from_apple(apple_name(name)): tensor
        for name, tensor in all_drawn(timm[form]["small"]).items()
    }
    encoder.load_state_dict(weights)
    for made in (encoder, encoder.fuse()):
        with torch.inference_mode():
            found = made(pixels(SMALL_PIXELS)).last_hidden_state
        expected = torch.tensor(timm[form]["output"]).view_as(found)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
