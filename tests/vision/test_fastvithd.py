"""FastViTHD: its published size, its three forms, and its place in a whole model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
)

from fastvlm.functional.errors import InputError
from fastvlm.functional.products import available
from fastvlm.vision import VARIANTS, FastViTHD, FastViTHDConfig, layers
from fastvlm.vision.convolutions import RepConv
from fastvlm.vision.layers import Downsample, RepMixer
from tests.models import LIVELY, VISUAL_TOKENS, randomise, small_encoder, small_encoder_config

FORMS = ("training", "reparameterized", "fused")


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Parameters and running statistics, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def in_form(encoder: FastViTHD, form: str) -> FastViTHD:
    """Fold an encoder in training form up to a form."""
    folds = {"training": encoder.eval, "reparameterized": encoder.reparameterize}
    return folds.get(form, encoder.fuse)()


@pytest.fixture(scope="module")
def released() -> FastViTHD:
    """The released variant as published, without memory for its weights."""
    with torch.device("meta"):
        return FastViTHD(FastViTHDConfig.variant("fastvithd")).reparameterize()


@pytest.fixture
def pixels() -> Tensor:
    """Two images, wider than high."""
    return torch.rand(2, 3, 128, 192, dtype=torch.float64)


def test_the_released_variant_has_the_published_parameters() -> None:
    with torch.device("meta"):
        encoder = FastViTHD(FastViTHDConfig.variant("fastvithd"))
    assert parameters(encoder) == 122_875_584
    assert parameters(encoder.reparameterize()) == 122_714_208


@pytest.mark.parametrize(
    ("size", "tokens", "gflop"),
    [
        (256, 16, 29.6),
        (512, 64, 119.1),
        (768, 144, 270.4),
        (1024, 256, 486.7),
        (1152, 324, 620.6),
        (1536, 576, 1133.6),
    ],
)
def test_visual_tokens_and_cost(released: FastViTHD, size: int, tokens: int, gflop: float) -> None:
    with FlopCounterMode(display=False) as counter:
        features = released(torch.empty(1, 3, size, size, device="meta")).last_hidden_state
    assert features.shape == (1, 3072, size // 64, size // 64)
    assert features.shape[2:].numel() == tokens
    assert round(counter.get_total_flops() / 1e9, 1) == gflop


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_built_as_folding_leaves_it(name: str, form: str) -> None:
    with torch.device("meta"):
        folded = in_form(FastViTHD(FastViTHDConfig.variant(name)), form)
        built = FastViTHD(FastViTHDConfig.variant(name, form=form))
    assert folded.config.form == form
    assert {name: tensor.shape for name, tensor in folded.state_dict().items()} == {
        name: tensor.shape for name, tensor in built.state_dict().items()
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
def test_folding_changes_no_output(dtype: torch.dtype, tolerance: float, pixels: Tensor) -> None:
    encoder = small_encoder().to(dtype)
    outputs = []
    with torch.no_grad():
        for form in FORMS:
            outputs.append(in_form(encoder, form)(pixels).last_hidden_state)
            assert encoder.config.form == form
    before, reparameterized, fused = outputs
    assert before.shape == (2, 128, 2, 3)
    assert before.dtype == dtype
    scale = before.abs().max()
    assert scale > 0.1
    assert (before[0] - before[1]).abs().max() > 0.1 * scale  # it sees the images
    for folded in (reparameterized, fused):
        assert (folded - before).abs().max() <= tolerance * max(1, scale)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in encoder.modules())


def test_computing_in_pieces_changes_no_output(
    pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = small_encoder().double().fuse()
    with torch.no_grad():
        whole = encoder(pixels).last_hidden_state
    # Pieces of five positions and fewer, so that the last one is shorter than the others.
    monkeypatch.setattr(layers, "FFN_CHUNK_VALUES", 5 * 4 * 16)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels).last_hidden_state, whole, rtol=0, atol=1e-12)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small matrices packed too."""
    if not available():
        pytest.skip("nothing is packed on this processor")
    monkeypatch.setattr("fastvlm.functional.products.SMALLEST_IN_16_BITS", 1)


def packed_parts(encoder: FastViTHD) -> list[nn.Module]:
    """Return the parts of an encoder that hold packed weights."""
    parts = encoder.modules()
    return [part for part in parts if getattr(part, "packed", None) is not None]


@pytest.mark.usefixtures("packing")
def test_packing_changes_no_output(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pixels = small_encoder().fuse(), pixels.float()
    with torch.inference_mode():
        exact = copy.deepcopy(encoder).double()(pixels).last_hidden_state
    taken = encoder.pack(2**30)
    # Seven feed-forward networks, and the two matrices of each of three attentions.
    assert len(packed_parts(encoder)) == 7 + 2 * 3
    assert taken == sum(
        weight.nbytes
        for name, weight in encoder.named_parameters()
        if name.endswith(("mlp.fc1.weight", "mlp.fc2.weight", ".qkv.weight", ".proj.weight"))
    )
    for values in (layers.FFN_CHUNK_VALUES, 5 * 4 * 16):
        monkeypatch.setattr(layers, "FFN_CHUNK_VALUES", values)
        with torch.inference_mode():
            found = encoder(pixels).last_hidden_state
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("way", ["written", "replaced", "data", "cast"])
def test_what_changes_after_packing_is_computed_as_it_is(way: str, pixels: Tensor) -> None:
    encoder, pixels = small_encoder().fuse(), pixels.float()
    encoder.pack(2**30)
    [ffn] = [part for part in packed_parts(encoder) if isinstance(part, layers.ConvFFN)][:1]
    if way == "written":
        with torch.no_grad():
            ffn.fc2.weight.mul_(3)
    elif way == "replaced":
        ffn.fc1.weight = nn.Parameter(3 * ffn.fc1.weight.detach())
    elif way == "data":
        ffn.fc1.weight.data = 3 * ffn.fc1.weight.data
    else:
        encoder.double()
    # A copy has nothing packed.
    plain = pickle.loads(pickle.dumps(encoder))
    assert not packed_parts(plain)
    with torch.inference_mode():
        found, wanted = (one(pixels).last_hidden_state for one in (encoder, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert ffn.packed is None
    assert bool(packed_parts(encoder)) is (way != "cast")


@pytest.mark.usefixtures("packing")
def test_packing_keeps_to_its_memory() -> None:
    encoder = small_encoder().fuse()
    whole = encoder.pack(2**30)
    some = small_encoder().fuse()
    assert 0 < some.pack(whole // 2) <= whole // 2
    assert 0 < len(packed_parts(some)) < len(packed_parts(encoder))
    assert small_encoder().fuse().pack(0) == 0


def test_folding_twice_is_folding_once(pixels: Tensor) -> None:
    encoder = small_encoder().double().fuse()
    with torch.no_grad():
        once = encoder(pixels).last_hidden_state
        assert torch.equal(encoder.reparameterize().fuse()(pixels).last_hidden_state, once)
    assert encoder.config.form == "fused"


def normed(x: Tensor, norm: nn.BatchNorm2d, *, training: bool) -> Tensor:
    """A BatchNorm by its definition."""
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scaled = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + norm.eps).sqrt()
    return scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def branches(x: Tensor, block: RepConv, *, stride: int, groups: int, training: bool) -> Tensor:
    """The sum of a RepConv's branches, from plain convolutions."""
    out = torch.zeros(())
    for part in (block.conv, block.branch):
        if part is not None:
            kernel = part.conv.weight
            moved = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, groups=groups)
            out = out + normed(moved, part.bn, training=training)
    return out if block.identity is None else out + normed(x, block.identity, training=training)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_rep_mixer_is_the_papers(training: bool) -> None:
    width = 12
    mixer = RepMixer(width, 1.0, "training").double().train(training)
    randomise(mixer)
    x = torch.randn(3, width, 5, 7, dtype=torch.float64)
    mixed = branches(x, mixer.mixer, stride=1, groups=width, training=training)
    expected = x + mixer.layer_scale.gamma * (
        mixed - normed(x, mixer.norm.identity, training=training)
    )
    assert mixer.mixer.conv.conv.weight.shape == (width, 1, 3, 3)
    assert mixer.mixer.branch.conv.weight.shape == (width, 1, 1, 1)
    assert (mixer.norm.conv, mixer.norm.branch) == (None, None)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-12, atol=1e-12)
    mixer.eval().reparameterize()
    if not training:
        torch.testing.assert_close(mixer(x), expected, rtol=1e-12, atol=1e-12)
        kernel, bias = mixer.reparam.weight, mixer.reparam.bias
        folded = F.conv2d(x, kernel, bias, padding=1, groups=width)
        torch.testing.assert_close(folded, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_downsample_is_the_papers(training: bool) -> None:
    down = Downsample(8, 24, "training").double().train(training)
    randomise(down)
    x = torch.randn(3, 8, 10, 6, dtype=torch.float64)
    large = F.gelu(branches(x, down.large, stride=2, groups=8, training=training))
    expected = F.gelu(branches(large, down.point, stride=1, groups=1, training=training))
    assert down.large.conv.conv.weight.shape == (24, 1, 7, 7)
    assert down.large.branch.conv.weight.shape == (24, 1, 3, 3)
    assert down.point.conv.conv.weight.shape == (24, 24, 1, 1)
    out = down(x)
    assert out.shape == (3, 24, 5, 3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter_in_training() -> None:
    encoder = small_encoder().train()
    encoder(torch.rand(2, 3, 128, 192)).last_hidden_state.square().sum().backward()
    without = [
        name
        for name, parameter in encoder.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not without


@pytest.mark.parametrize("form", FORMS)
def test_saving_and_loading_keeps_the_outputs(form: str, tmp_path: Path, pixels: Tensor) -> None:
    encoder = in_form(small_encoder(layer_scale_init=0.5, image_size=192), form)
    encoder.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is FastViTHD
    assert loaded.config.to_dict() == encoder.config.to_dict() | {
        "_name_or_path": loaded.config.to_dict().get("_name_or_path", "")
    }
    assert (loaded.config.form, loaded.config.image_size) == (form, 192)
    assert_same_weights(loaded, encoder)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
        # Weights at another address may be summed in another order.
        torch.testing.assert_close(loaded(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(100, 128), (128, 96), (0, 64), (1, 1)])
def test_a_size_between_the_steps_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"multiples of 64 pixels; got {size[0]} x {size[1]}"):
        small_encoder()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"form": "folded"}, "training, reparameterized, fused; got 'folded'"),
        ({"depths": (1, 1, 1, 1)}, r"five stages; got depths \(1, 1, 1, 1\)"),
        ({"widths": (8, 16, 32, 64)}, "five stages"),
        ({"widths": (8, 16, 32, 48, 64)}, r"multiples of the head size 32; got \(48, 64\)"),
    ],
)
def test_an_impossible_shape_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_encoder_config(**wrong)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(InputError, match="fastvithd-small; got 'fastvit-ma36'"):
        FastViTHDConfig.variant("fastvit-ma36")


@pytest.fixture
def whole() -> FastVlmForConditionalGeneration:
    """A whole model of transformers' with our encoder, in training form."""
    torch.manual_seed(8)
    config = FastVlmConfig(
        vision_config=small_encoder_config().to_dict(),
        text_config={**LIVELY, "vocab_size": 50},
        image_token_id=49,
        image_seq_length=VISUAL_TOKENS,
    )
    model = FastVlmForConditionalGeneration(config).eval()
    randomise(model.model.vision_tower)
    return model


@torch.no_grad()
def answers(model: FastVlmForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """Visual tokens and logits of one prompt about an image."""
    torch.manual_seed(9)
    pixels = torch.rand(1, 3, 128, 128)
    tokens = torch.tensor([[3, *[49] * VISUAL_TOKENS, 7, 8]])
    return model.get_image_features(pixels).pooler_output, model(tokens, pixel_values=pixels).logits


@pytest.mark.parametrize("form", FORMS)
def test_transformers_take_it_as_a_vision_tower(
    form: str, whole: FastVlmForConditionalGeneration, tmp_path: Path
) -> None:
    before, logits = answers(whole)
    assert before.shape == (1, VISUAL_TOKENS, 64)
    assert before[0].std(0).mean() > 0.01
    in_form(whole.model.vision_tower, form)
    folded = answers(whole)
    torch.testing.assert_close(folded[1], logits, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded.model.vision_tower, FastViTHD)
    assert isinstance(loaded.config.vision_config, FastViTHDConfig)
    assert loaded.config.vision_config.form == form
    assert_same_weights(loaded, whole)
    for ours, theirs in zip(answers(loaded), folded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
