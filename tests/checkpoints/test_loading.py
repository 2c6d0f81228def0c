"""Checkpoints of FastVLM load in one line, compute what their parts compute, and convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import fastvlm
from fastvlm.checkpoints import load_checkpoint, save_checkpoint
from fastvlm.checkpoints.keys import from_timm
from fastvlm.checkpoints.weights import read_weights
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.vision import FastViTHD, FastViTHDConfig
from tests.checkpoints.conftest import (
    FORM,
    SIZE,
    TEXT,
    apple_weights,
    decoder_weights,
    encoder_weights,
    projector_weights,
    transformers_weights,
    write_apple,
    write_transformers,
)
from tests.checkpoints.reference import SMALL, pixels

pytestmark = pytest.mark.usefixtures("small_release")

Writer = Callable[..., Path]
IMAGE = pixels((1, 3, SIZE, SIZE))
BEFORE, AFTER = [1, 60, 61], [62, 63, 2]


@torch.inference_mode()
def by_parts(tied: bool) -> Tensor:
    """Return the logits of an image between two texts, computed part by part."""
    encoder = FastViTHD(FastViTHDConfig(**SMALL, form=FORM)).eval()
    encoder.load_state_dict({from_timm(name): w for name, w in encoder_weights().items()})
    seen = encoder(IMAGE).last_hidden_state.flatten(2).transpose(1, 2)
    layers = projector_weights()
    seen = F.gelu(F.linear(seen, layers["1.weight"], layers["1.bias"]))
    seen = F.linear(seen, layers["2.weight"], layers["2.bias"])
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    decoder = Qwen2ForCausalLM(
        Qwen2Config(**TEXT, tie_word_embeddings=tied, rope_parameters=rope)
    ).eval()
    decoder.load_state_dict(decoder_weights(tied), strict=not tied)
    embed = decoder.get_input_embeddings()
    text = [embed(torch.tensor([part])) for part in (BEFORE, AFTER)]
    return decoder(inputs_embeds=torch.cat((text[0], seen, text[1]), 1)).logits


@pytest.mark.parametrize("write", [write_apple, write_transformers])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_computes_what_its_parts_compute(
    tmp_path: Path, write: Writer, tied: bool
) -> None:
    model, _ = load_checkpoint(write(tmp_path / "model", tied=tied), torch.float32, "cpu")
    tokens = torch.tensor([[*BEFORE, *[model.config.image_token_id] * 9, *AFTER]])
    with torch.inference_mode():
        found = model(input_ids=tokens, pixel_values=IMAGE).logits
    torch.testing.assert_close(found, by_parts(tied), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", [write_apple, write_transformers])
def test_one_line_loads_and_replies(tmp_path: Path, write: Writer) -> None:
    vlm = fastvlm.load(write(tmp_path / "model"))
    assert vlm.image_size == SIZE
    assert vlm.model.model.vision_tower.config.form == "fused"
    reply = vlm.generate("What is it?", Image.new("RGB", (50, 30), "red"), max_new_tokens=4)
    assert reply.token_ids


def test_apples_conversation(tmp_path: Path) -> None:
    vlm = fastvlm.load(write_apple(tmp_path / "model"))
    tokens = vlm.tokens("What is it?", images=1)
    image = vlm.model.config.image_token_id
    assert tokens.count(image) == 9
    assert vlm.tokenizer.decode([token for token in tokens if token != image]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert vlm.end_tokens == {vlm.tokenizer.eos_token_id}


@pytest.mark.parametrize("write", [write_apple, write_transformers])
def test_converting_keeps_every_parameter(tmp_path: Path, write: Writer) -> None:
    model, tokenizer = load_checkpoint(write(tmp_path / "model"), torch.float32, "cpu")
    save_checkpoint(model, tokenizer, tmp_path / "ours")
    save_checkpoint(model, tokenizer, tmp_path / "theirs", "transformers")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    expected = transformers_weights()
    assert theirs.keys() == expected.keys()
    assert all(theirs[name].equal(expected[name]) for name in expected)
    vision = json.loads((tmp_path / "theirs" / "config.json").read_text())["vision_config"]
    assert (vision["model_type"], vision["architecture"]) == ("timm_wrapper", "fastvit_mci3")
    for name in ("ours", "theirs"):
        again, _ = load_checkpoint(tmp_path / name, torch.float32, "cpu")
        assert again.config.image_token_id == model.config.image_token_id
        assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
        state = again.state_dict()
        assert all(state[key].equal(tensor) for key, tensor in model.state_dict().items())


def test_what_is_converted_does_not_overwrite(tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(write_apple(tmp_path / "model"), torch.float32, "cpu")
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(model, tokenizer, tmp_path / "model")
    model.model.vision_tower.fuse()
    with pytest.raises(InputError, match="folded for good"):
        save_checkpoint(model, tokenizer, tmp_path / "theirs", "transformers")
    assert not (tmp_path / "theirs").exists()


def rewrite(folder: Path, weights: dict[str, Tensor]) -> None:
    """Replace a checkpoint's weights by others, in one file."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors")


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    folder = write_apple(tmp_path / "model")
    weights = apple_weights()
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.zeros(2)
    weights["model.mm_projector.0.bias"] = torch.zeros(5)
    rewrite(folder, weights)
    with pytest.raises(CheckpointError) as told:
        load_checkpoint(folder, torch.float32, "cpu")
    assert "model.language_model.norm.weight is missing" in str(told.value)
    assert "model.extra.weight is left over" in str(told.value)
    assert "linear_1.bias (5, not 32) is misshapen" in str(told.value)


def test_many_wrong_weights_are_counted(tmp_path: Path) -> None:
    folder = write_apple(tmp_path / "model")
    rewrite(folder, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"and \d+ more are missing"):
        load_checkpoint(folder, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("write", "changes", "told"),
    [
        (write_apple, {"mm_vision_tower": "openai/clip-vit-large"}, "vision tower of this"),
        (write_apple, {"mm_projector_type": "linear"}, "projector of this checkpoint is 'linear'"),
        (write_apple, {"mm_vision_tower": "mobileclip_l_1000"}, "no multiple of 64"),
        (write_transformers, {"image_seq_length": 10}, "not a square number"),
        (
            write_transformers,
            {"vision_config": {"model_type": "timm_wrapper", "architecture": "vit_base"}},
            "timm's 'vit_base'",
        ),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, write: Writer, changes: dict, told: str
) -> None:
    folder = write(tmp_path / "model", **changes)
    with pytest.raises((InputError, CheckpointError), match=told):
        load_checkpoint(folder, torch.float32, "cpu")


def test_pytorchs_own_files_are_read(tmp_path: Path) -> None:
    folder = write_apple(tmp_path / "model")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(apple_weights(), folder / "pytorch_model.bin")
    found = read_weights(folder)
    assert all(found[name].equal(weight) for name, weight in apple_weights().items())
    assert fastvlm.load(folder).image_size == SIZE


class Evil:
    """What a hostile file holds: something to be executed when it is read."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_weights_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than weights, and is not executed"):
        read_weights(tmp_path)
    assert not Path("executed").exists()


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There are no weights in"):
        read_weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names the shard one.safetensors, which is not in"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(CheckpointError, match="which is not in"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (tmp_path / "one.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        read_weights(tmp_path)
