"""FastVLM-0.5B at full size, with random weights, through every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict

import fastvlm
from fastvlm.checkpoints import load_checkpoint, save_checkpoint
from fastvlm_example.scenes import render, sample
from tests.checkpoints.conftest import chatml_tokenizer
from tests.checkpoints.reference import all_drawn, apple_name, read_fixture
from ttft_models import DECODERS

pytestmark = pytest.mark.slow


def write_whole(folder: Path) -> None:
    """Write a whole FastVLM-0.5B in Apple's layout, as released: reparameterized, in bfloat16."""
    text = DECODERS["0.5B"]
    config = {
        **text,
        "model_type": "llava_qwen2",
        "mm_vision_tower": "mobileclip_l_1024",
        "mm_projector_type": "mlp2x_gelu",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "eos_token_id": 2,
    }
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        shell = Qwen2ForCausalLM(
            Qwen2Config(**{k: v for k, v in text.items() if k != "model_type"})
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    del shapes["lm_head.weight"]
    width = text["hidden_size"]
    shapes |= {
        "model.mm_projector.0.weight": (width, 3072),
        "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width),
        "model.mm_projector.2.bias": (width,),
    }
    tower = "model.vision_tower.vision_tower.model."
    encoder = all_drawn(read_fixture()["reparameterized"]["released"])
    weights = {
        **all_drawn(shapes),
        **{tower + apple_name(name): weight for name, weight in encoder.items()},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    halved = {
        name: weight.bfloat16() if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }
    save_torch_state_dict(halved, folder)
    chatml_tokenizer().save_pretrained(folder)


def test_every_layout_gives_the_same_bytes_and_tokens(tmp_path: Path) -> None:
    write_whole(tmp_path / "apple")
    before = tmp_path / "apple"
    for name, layout in (("ours", "fastvlm"), ("theirs", "transformers"), ("again", "fastvlm")):
        model, tokenizer = load_checkpoint(before, torch.bfloat16, "cpu")
        before = tmp_path / name
        save_checkpoint(model, tokenizer, before, layout)
        del model
    for file in (tmp_path / "ours").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    replies = []
    for name in ("apple", "ours", "theirs"):
        vlm = fastvlm.load(tmp_path / name)
        # Without a penalty, tied embeddings of random weights repeat one token.
        reply = vlm.generate(
            "What is it?", render(sample(1), 576), max_new_tokens=8, repetition_penalty=10.0
        )
        replies.append(reply.token_ids)
        del vlm
    assert replies[0] == replies[1] == replies[2]
    assert len(set(replies[0])) > 1
