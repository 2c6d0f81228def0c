"""Against timm itself, at full size: `fastvit_mci3` in both layouts of the world.

timm brings torchvision, which is kept out of fastvlm's own environment. To run these:

    python -m venv --system-site-packages throwaway
    throwaway/bin/pip install timm
    throwaway/bin/python -m pytest tests/checkpoints -m slow
"""

from __future__ import annotations

import pytest
import torch

from fastvlm.checkpoints.keys import from_apple, from_timm
from fastvlm.vision import FastViTHD, FastViTHDConfig
from tests.checkpoints.reference import (
    FORMS,
    all_drawn,
    apple_name,
    computed,
    pixels,
    read_fixture,
    shapes_of,
    timm_encoder,
)

timm = pytest.importorskip("timm", reason="timm is not installed; see this file's docstring")

pytestmark = pytest.mark.slow

SIZES = ((256, 256), (512, 512), (1024, 1024), (512, 768))


def test_the_fixture_is_timms() -> None:
    recorded = read_fixture()
    for form in FORMS:
        assert shapes_of(timm_encoder(form, device="meta")) == recorded[form]["released"]
        assert shapes_of(timm_encoder(form, small=True)) == recorded[form]["small"]
        found = computed(form).flatten()
        torch.testing.assert_close(
            found, torch.tensor(recorded[form]["output"]), rtol=1e-5, atol=1e-5
        )


def test_the_encoder_is_timms_own_row() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("fastvit_mci3", num_classes=0)
    assert shapes_of(theirs) == read_fixture()["training"]["released"]


def test_apples_names_are_those_that_timm_reads() -> None:
    """timm's reader of MobileCLIP's checkpoints turns Apple's names into its own."""
    from timm.models.fastvit import checkpoint_filter_fn

    names = read_fixture()["training"]["released"]
    apples = {apple_name(name): name for name in names}
    assert checkpoint_filter_fn(dict(apples), timm_encoder("training", device="meta")) == {
        name: name for name in names
    }


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMS)
def test_outputs_agree_at_full_size(form: str) -> None:
    theirs = timm_encoder(form)
    weights = all_drawn(shapes_of(theirs))
    theirs.load_state_dict(weights)
    ours = [FastViTHD(FastViTHDConfig.variant("fastvithd", form=form)).eval() for _ in range(2)]
    ours[0].load_state_dict({from_timm(name): tensor for name, tensor in weights.items()})
    ours[1].load_state_dict(
        {from_apple(apple_name(name)): tensor for name, tensor in weights.items()}
    )
    ours[1].fuse()
    for height, width in SIZES:
        image = pixels((1, 3, height, width))
        expected = theirs.forward_features(image)
        for encoder in ours:
            found = encoder(image).last_hidden_state
            assert found.shape == (1, 3072, height // 64, width // 64)
            # float32 rounds each sum relative to its largest terms, so the largest feature is the
            # measure; timm's own float32 lies as far from its float64.
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
