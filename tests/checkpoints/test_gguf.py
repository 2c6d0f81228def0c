"""A text model in a GGUF file becomes the model that transformers reads from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastvlm.checkpoints import load_checkpoint
from fastvlm.checkpoints.gguf import convert_gguf
from fastvlm.cli import run
from fastvlm.functional.errors import CheckpointError, InputError
from fastvlm.language import split_decoder
from fastvlm.vlm import load

LAYERS, WIDTH, HEADS, HEAD_DIM, INNER = 2, 64, 2, 32, 96
Q8_0 = gguf.GGMLQuantizationType.Q8_0
WORDS = ["▁a", "▁b", "▁", "a", "b", "c", "▁ab", "ab"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]


def write_gemma(file: Path, quantised: gguf.GGMLQuantizationType = Q8_0) -> None:
    """Write a small Gemma 3 with random weights, its matrices quantised."""
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_name("small")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(place) for place in range(len(TOKENS))])
    kinds = gguf.TokenType
    special, byte = [kinds.CONTROL] * 3 + [kinds.UNKNOWN], [kinds.BYTE] * 256
    writer.add_token_types([*special, *byte, *[kinds.NORMAL] * len(WORDS)])
    for add, token in (
        (writer.add_pad_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(token)
    draw = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draw.normal(scale=columns**-0.5, size=(rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(name, draw.uniform(0.5, 1.5, size).astype(np.float32))

    matrix("token_embd.weight", len(TOKENS), WIDTH)
    norm("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn", "post_attention", "ffn", "post_ffw"):
            norm(f"{block}.{name}_norm.weight", WIDTH)
        for name in ("attn_q", "attn_k"):
            norm(f"{block}.{name}_norm.weight", HEAD_DIM)
        matrix(f"{block}.attn_q.weight", HEADS * HEAD_DIM, WIDTH)
        matrix(f"{block}.attn_k.weight", HEAD_DIM, WIDTH)
        matrix(f"{block}.attn_v.weight", HEAD_DIM, WIDTH)
        matrix(f"{block}.attn_output.weight", WIDTH, HEADS * HEAD_DIM)
        matrix(f"{block}.ffn_gate.weight", INNER, WIDTH)
        matrix(f"{block}.ffn_up.weight", INNER, WIDTH)
        matrix(f"{block}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_converted_model_is_the_one_that_transformers_reads(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    write_gemma(tmp_path / "small.gguf")
    known = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    found = convert_gguf(tmp_path / "small.gguf", tmp_path / "model", dtype)
    assert found.quantisation == ("Q8_0",)
    assert found.parameters == sum(p.numel() for p in known.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours, read = load_checkpoint(tmp_path / "model", dtype)
    tokens = tokenizer("ab a b cab", return_tensors="pt").input_ids
    assert read("ab a b cab").input_ids == tokens[0].tolist()
    assert again.dtype == ours.dtype == dtype
    with torch.no_grad():
        expected = known(input_ids=tokens).logits
        assert again(input_ids=tokens).logits.equal(expected)
        assert ours(input_ids=tokens).logits.equal(expected)
    assert split_decoder(ours).depth == LAYERS


def test_the_command_line_says_how_it_was_quantised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gemma(tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q5_0)
    out = tmp_path / "model"
    assert run(["convert", str(tmp_path / "small.gguf"), str(out), "--dtype", "float32"]) == 0
    assert "Q5_0" in capsys.readouterr().out
    assert load(out).generate("ab", max_new_tokens=3).token_ids
    refused = ["convert", str(tmp_path / "small.gguf"), str(tmp_path / "no"), "--layout", "fastvlm"]
    assert run(refused) == 1
    assert "text model" in capsys.readouterr().err


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "unheard-of")
    writer.add_tensor("weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("spoil", [cut, empty, other])
def test_a_broken_file_is_refused_and_leaves_nothing(spoil: Any, tmp_path: Path) -> None:
    write_gemma(tmp_path / "small.gguf")
    spoil(tmp_path / "small.gguf")
    with pytest.raises(CheckpointError, match=r"small\.gguf"):
        convert_gguf(tmp_path / "small.gguf", tmp_path / "model", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    write_gemma(tmp_path / "small.gguf")
    with pytest.raises(InputError, match="exists already"):
        convert_gguf(tmp_path / "small.gguf", tmp_path, torch.float32)
