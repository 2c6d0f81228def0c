"""Folders with a file that is missing, cut or something else: one sentence that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

import fastvlm
from fastvlm.checkpoints.files import DRAFT_MODEL_TYPE
from fastvlm.drafting import ImitationConfig
from fastvlm.functional.errors import FastVlmError, InputError
from tests.families import FAMILIES, NEWER, T5, finished, replies
from tests.processors import character_tokenizer, saved

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEIGHTS = "model.safetensors"
LAYER = ".layers.1."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each of some families."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llava", "qwen2-vl"):
        saved(family, folder / family)
    model, _ = FAMILIES["llama"]()
    model.save_pretrained(folder / "llama")
    character_tokenizer().save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    """Return a model of text alone, to be broken."""
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


def sentence(folder: Path | str, **options: Any) -> str:
    """Return what is said of a model that can't be loaded: one sentence."""
    with pytest.raises(FastVlmError) as caught:
        fastvlm.load(folder, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert "<class" not in said
    assert said.rstrip()[-1] in ".?"
    assert not said.endswith((":.", ",.", "from one of."))
    return said


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "smolvlm"])
@pytest.mark.parametrize("how", ["missing", "prefixed", "misshapen"])
def test_no_weight_is_left_at_random(how: str, family: str, models: Path, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    if not (models / family).exists():
        saved(family, models / family)
    folder = Path(shutil.copytree(models / family, tmp_path / family))
    weights = load_file(folder / WEIGHTS)
    layer = next(name for name in weights if LAYER in name and name.endswith("proj.weight"))
    if how == "missing":
        weights = {name: w for name, w in weights.items() if LAYER not in name}
    elif how == "prefixed":
        weights = {f"odd.{name}": weight for name, weight in weights.items()}
    else:
        weights[layer] = weights[layer][:-1].clone()
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    said = sentence(folder)
    assert str(folder) in said
    assert how in said or "missing" in said
    assert ("layers.1." in said) or how == "prefixed"


def test_weights_that_nothing_uses_are_named(llama: Path) -> None:
    weights = load_file(llama / WEIGHTS)
    weights["model.layers.9.odd.weight"] = torch.zeros(3)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(weights, llama / WEIGHTS, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"layers\.9\.odd\.weight") as warned:
        fastvlm.load(llama)
    assert len(warned) == 1


def spoil(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Return what writes a file, or removes it."""

    def change(folder: Path) -> None:
        file = folder / name
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content)

    return change


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def lengthened(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.gguf")


def folder_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def too_large(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 2**20}))


def too_deep(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**15}))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (spoil("config.json", None), "config.json"),
    "a list": (spoil("config.json", "[]"), "config.json"),
    "an empty object": (spoil("config.json", "{}"), "config.json"),
    "one field": (spoil("config.json", '{"hidden_size": 4}'), "config.json"),
    "no JSON": (spoil("config.json", "{'a': 1}"), "config.json"),
    "an empty file": (spoil("config.json", ""), "config.json"),
    "a binary": (spoil("config.json", b"\xff\xfe\0"), "config.json"),
    "nested too deeply": (spoil("config.json", "[" * 100_000), "config.json"),
    "another library's family": (spoil("config.json", '{"model_type": "odd"}'), "config.json"),
    "a pointer for a configuration": (spoil("config.json", POINTER), "Git LFS"),
    "far too large": (too_large, "config.json"),
    "far too deep": (too_deep, "num_hidden_layers"),
    "odd generation settings": (
        spoil("generation_config.json", '{"eos_token_id": "x"}'),
        "generation_config.json",
    ),
    "no weights": (spoil(WEIGHTS, None), WEIGHTS),
    "a pointer for weights": (spoil(WEIGHTS, POINTER), "Git LFS"),
    "a page for weights": (spoil(WEIGHTS, "<!DOCTYPE html><html>"), "HTML"),
    "nothing in the weights": (spoil(WEIGHTS, b""), "empty"),
    "zeros for weights": (spoil(WEIGHTS, bytes(5000)), WEIGHTS),
    "cut weights": (cut, "100 bytes"),
    "more than weights": (lengthened, "4 bytes"),
    "a folder for weights": (folder_for_weights, WEIGHTS),
    "llama.cpp's weights": (gguf, "GGUF"),
    "a broken header": (spoil(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), WEIGHTS),
    "a pickle's remains": (
        lambda folder: (spoil(WEIGHTS, None)(folder), spoil("pytorch_model.bin", "x")(folder))[0],
        "pytorch_model.bin",
    ),
    "no tokenizer": (spoil("tokenizer.json", None), "tokenizer.json"),
    "an empty tokenizer": (spoil("tokenizer.json", "{}"), "tokenizer"),
    "a pointer for a tokenizer": (spoil("tokenizer.json", POINTER), "Git LFS"),
    "a list for a tokenizer's settings": (
        spoil("tokenizer_config.json", "[1]"),
        "tokenizer_config",
    ),
    "a broken template": (spoil("chat_template.jinja", "{% for %}"), "template"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_wrong_is_named(how: str, llama: Path) -> None:
    change, told = BROKEN[how]
    change(llama)
    if how == "a broken template":
        with pytest.raises(InputError, match=told):
            fastvlm.load(llama).generate("What?")
        return
    said = sentence(llama)
    assert told in said
    assert str(llama) in said


def test_what_is_no_folder_of_a_model(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(json.dumps({"model_type": DRAFT_MODEL_TYPE}))
    (tmp_path / "draft" / WEIGHTS).write_bytes(b"x")
    for name in ("none", "empty", "loop", "adapter", "draft"):
        assert str(tmp_path / name) in sentence(tmp_path / name)
    assert "config.json" in sentence(llama / WEIGHTS)
    assert "adapter" in sentence(tmp_path / "adapter")
    assert "draft" in sentence(tmp_path / "draft")
    assert ImitationConfig.model_type == DRAFT_MODEL_TYPE


def test_a_name_on_the_hub_without_a_network() -> None:
    assert "owner/name" in sentence("owner/name")
    assert "owner/name" in sentence("owner/name", revision="v1", token="secret")
    assert "secret" not in sentence("owner/name", token="secret")


def text_t5() -> PreTrainedModel:
    torch.manual_seed(5)
    return finished(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**T5)))


@pytest.mark.parametrize("family", ["t5", "mt5", "t5gemma", "bart", "llama"])
def test_a_model_of_text_loads_by_its_family(family: str, models: Path, tmp_path: Path) -> None:
    folder = models / "llama"
    if family != "llama":
        folder = tmp_path / family
        model = text_t5() if family == "t5" else NEWER[family]()[0]
        model.save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
    vlm = fastvlm.load(folder, dtype=torch.float64)
    inputs = vlm.prompts.inputs([{"role": "user", "content": "What is it?"}])
    [expected] = replies(vlm.model, inputs, 9)
    for strategy in ("autoregressive", "early-exit", "prompt-lookup"):
        reply = vlm.generate("What is it?", strategy=strategy, max_new_tokens=9)
        assert reply.token_ids == expected


def test_options_are_handed_to_transformers(models: Path) -> None:
    vlm = fastvlm.load(models / "llama", attn_implementation="eager")
    assert vlm.model.config._attn_implementation == "eager"
    vlm = fastvlm.load(models / "llama", device_map={"": "cpu"})
    assert vlm.generate("What?", max_new_tokens=3).token_ids
    with pytest.raises(InputError):
        fastvlm.load(models / "llama", device="cpu", device_map="auto")
    with pytest.raises(InputError, match="attn_implementation"):
        fastvlm.load(models / "llama", attn_implementatoin="eager")  # type: ignore[call-arg]
    said = sentence(models / "llama", attn_implementation="flash_attention_9")
    assert "flash_attention_9" in said


def test_code_beside_the_weights_is_never_run(llama: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(llama.parent)
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "odd.py").write_text("from pathlib import Path\nPath('run').touch()\n")
    assert "trust_remote_code" in sentence(llama)
    assert not (llama.parent / "run").exists()


def test_an_unknown_family_is_refused_before_its_weights_are_read(llama: Path) -> None:
    config = {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 8, "state_size": 4}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
    said = sentence(llama)
    assert "mamba has layers of the kind linear_attention" in said
    assert "can't be rolled back" in said
    assert "own generate" in said
    assert "gpt_neox" in said


def test_a_family_that_fails_when_it_runs_is_refused_before_its_weights_are_read(
    llama: Path,
) -> None:
    config = {"model_type": "doge", "num_hidden_layers": 2, "hidden_size": 64}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
    said = sentence(llama)
    assert "can't split doge" in said
    assert "own generate" in said
