"""A tiny model, its drafts and some images in the places of those that ship."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, PreTrainedTokenizerFast

import fastvlm_example
from fastvlm.cli import run, verbs
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import initialise_from
from fastvlm.vision import FastViTHDConfig
from fastvlm_example.scenes import render, sample
from fastvlm_example.tokenizer import IMAGE, learn_tokenizer

CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Output:
    """What a command line left."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Return the one sentence on standard error."""
        assert self.out == ""
        assert self.err.startswith("fastvlm: ")
        assert self.err[-2:] in (".\n", "?\n")
        assert self.err.count("\n") == 1
        return self.err


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> FastVlmForConditionalGeneration:
    """Return a FastVLM with random weights: 4 visual tokens at 128 px, 5 decoder layers."""
    torch.manual_seed(seed)
    vision = FastViTHDConfig(
        depths=(1, 1, 1, 1, 1), widths=(8, 16, 32, 32, 32), layer_scale_init=1.0, image_size=128
    )
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        # Large weights, so that a random model doesn't just repeat one token.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = FastVlmConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    model = FastVlmForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save_draft(model: FastVlmForConditionalGeneration, kind: str, folder: Path) -> None:
    """Save an untrained imitation network for a model."""
    network = ImitationNetwork(
        ImitationConfig(
            kind=kind,
            exit_layer=2,
            text_config=model.config.get_text_config().to_dict(),
            target=fingerprint(model),
            num_speculative_tokens=4,
            confidence=0.0,
        )
    )
    initialise_from(network, list(model.get_decoder().layers))
    network.save_pretrained(folder)


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like `fastvlm_example`, with another model in `other`."""
    folder = tmp_path_factory.mktemp("shipped")
    corpus = ["a small red square is above a large blue circle", "Describe the picture."] * 20
    tokenizer = learn_tokenizer(corpus, 320)
    for name, seed in (("model", 6), ("other", 7)):
        model = tiny_model(tokenizer, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "model":
            save_draft(model, "block", folder / "draft")
            save_draft(model, "mlp", folder / "draft-mlp")
    images = folder / "images"
    images.mkdir()
    for seed in range(2):
        render(sample(seed), 192).save(images / f"{seed}.png")
    listing = [
        {"file": "0.png", "kind": "scene", "title": "A scene", "credit": None, "licence": None,
         "source": None},
        {"file": "1.png", "kind": "photo", "title": "A photo", "credit": "Jane Doe",
         "licence": "CC BY 2.0", "source": "https://example.org/1"},
    ]  # fmt: skip
    (images / "images.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def cli(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Return a function that runs a command line where the tiny model is the example model."""
    monkeypatch.setattr(fastvlm_example, "FOLDER", shipped)
    for name in ("model", "draft", "images"):
        monkeypatch.setattr(fastvlm_example, name.upper(), shipped / name)
    monkeypatch.setattr(fastvlm_example, "DRAFT_MLP", shipped / "draft-mlp")
    assert verbs  # which imports the modules of all verbs
    monkeypatch.setattr(sys.modules["fastvlm.cli.demo"], "MAX_NEW_TOKENS", 12)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: object) -> Output:
        code = run([str(word) for word in words])
        return Output(code, *capsys.readouterr())

    return call


@pytest.fixture
def broken(shipped: Path, tmp_path: Path) -> Path:
    """Return an image that ends too early."""
    whole = (shipped / "images" / "0.png").read_bytes()
    file = tmp_path / "truncated.png"
    file.write_bytes(whole[: len(whole) // 2])
    return file
