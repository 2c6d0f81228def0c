"""Every script runs on a small model, and writes what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import fastvlm
import fastvlm_example
from fastvlm.drafting import adaptive
from fastvlm_example.scenes import render, sample
from tests.processors import character_tokenizer

ROOT = Path(__file__).parents[2]
MODULES = {
    "family_lists",
    "hostile_requests",
    "scale_figures",
    "serving_clients",
    "serving_figures",
    "text_figures",
    "ttft_models",
    "ttft_report",
    "ttft_stages",
}
"""What scripts import."""
SCRIPTS = sorted({file.stem for file in (ROOT / "benchmarks").glob("*.py")} - MODULES)
ELSEWHERE = {"figures", "accelerator", "decoding_peers", "ttft"}
"""Scripts that have tests of their own."""
PEERS = {"serving_peers"}
"""Scripts that need other engines, each in an environment of its own."""
SMALL_DEPTH = 5
"""Layers of the small model."""
Run = Callable[..., Any]


def script(name: str) -> ModuleType:
    """Return a script as a module; it does nothing yet."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    # As Python has it for a script: what lies beside it can be imported.
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a script with some options, and returns the JSON it wrote."""
    monkeypatch.setattr(fastvlm_example, "FOLDER", shipped)
    for name in ("model", "draft", "images"):
        monkeypatch.setattr(fastvlm_example, name.upper(), shipped / name)
    monkeypatch.setattr(fastvlm_example, "DRAFT_MLP", shipped / "draft-mlp")
    file = tmp_path / "figures.json"

    def call(name: str, *options: object, writes: bool = True, **changes: Any) -> Any:
        module = script(name)
        for what, value in changes.items():
            monkeypatch.setattr(module, what, value)
        words = [name, *map(str, options), *(["--json", str(file)] if writes else [])]
        monkeypatch.setattr(sys, "argv", words)
        try:
            module.main()
        finally:
            torch.set_flush_denormal(False)
        return json.loads(file.read_text()) if writes else None

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder in Flickr8k's layout."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(6)]
    for number, name in enumerate(names):
        render(sample(number), 64).save(folder / "images" / name)
    (folder / "captions.tsv").write_text("".join(f"{n}\tA red square .\n" for n in names))
    (folder / "train.txt").write_text("\n".join(names[:4]))
    (folder / "dev.txt").write_text("\n".join(names[4:]))
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing_and_help_is_there(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(name)
    assert capsys.readouterr().out == ""
    if name == "figures":
        return
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    assert "--" in capsys.readouterr().out


def test_every_script_is_tested() -> None:
    source = Path(__file__).read_text()
    assert all(name in ELSEWHERE | PEERS or f'("{name}"' in source for name in SCRIPTS)


def test_batches(run: Run, photos: Path) -> None:
    images = photos / "images"
    found = run("batches", "--photos", images, "--batches", 1, "--threads", 1, SIZES=(1, 2),
                MAX_NEW_TOKENS=8)  # fmt: skip
    assert set(found["images"]) == {"scenes", "photos"}
    for sizes in found["images"].values():
        assert set(sizes) == {"1", "2"}
        assert all(row["ordinary"] > 0 and row["ratio"] > 0 for row in sizes.values())


@pytest.mark.slow
def test_draft_length(run: Run, photos: Path) -> None:
    found = run("draft_length", "--photos", photos / "images", "--images", 1,
                "--only", "photos,untrained", "--threads", 1, "--rule", adaptive.__file__,
                FIXED=(2,), MAX_NEW_TOKENS=8)  # fmt: skip
    assert found["photos"]["results"].keys() >= {"fixed 2", "other rule"}
    assert len(found["untrained drafts"]["results"]) >= 2


def test_cost_model(run: Run, tmp_path: Path) -> None:
    row = {"strategy": "imitation", "draft_length": 2.0, "acceptance_length": 1.5,
           "speedup": 1.1, "speedup_iqr": [1.0, 1.2]}  # fmt: skip
    results = tmp_path / "scenes.json"
    results.write_text(json.dumps({"results": [row]}))
    found = run("cost_model", results, "--threads", 1)
    [one] = found["runs"]
    assert one["images"] == "scenes"
    costs = one["draft_length"] * one["drafted_ms"] + one["verify_ms"]
    assert one["predicted"] == pytest.approx(1.5 * one["ordinary_ms"] / costs)


@pytest.mark.slow
def test_ablation(run: Run, photos: Path, tmp_path: Path) -> None:
    own, data = (
        {name: plan for name, plan in plans.items() if plan.exit_layer < SMALL_DEPTH}
        for plans in (script("ablation").OWN, script("ablation").DATA)
    )
    found = run("ablation", "--photos", photos, "--output", tmp_path / "out", "--scenes",
                2, "--limit", 2, "--held-out", 1, "--steps", 1, "--threads", 1, OWN=own,
                DATA=data)  # fmt: skip
    assert found["drafts"].keys() == {*own, *data}
    assert all(parts.keys() == {"scenes", "photos"} for parts in found["drafts"].values())


def test_packed(run: Run) -> None:
    def small(packed_bytes: int) -> Any:
        vlm = fastvlm.load(packed_bytes=packed_bytes)
        return sys.modules["packed"].Named("small", vlm.model, vlm.decoder)

    found = run("packed", "--threads", 1, like_qwen2_7b=small, WIDTHS=(1, 2))
    assert [one["name"] for one in found["decoders"]][1] == "small"
    assert all(len(one["passes"]) == 2 for one in found["decoders"])


def test_runtimes(run: Run) -> None:
    pytest.importorskip("onnxruntime")

    def small() -> Any:
        made = sys.modules["runtimes"]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
        return made.Named("small", model, made.untrained(model))

    found = run("runtimes", "--threads", 1, "--only", "random", "--clock", "cpu",
                like_smollm2=small, ROUNDS=2)  # fmt: skip
    [one] = found["decoders"]
    assert one["runtimes"].keys() == {"torch", "onnx", "onnx int8", "onnx int4"}
    assert all(row.keys() == {"ordinary", "verify", "draft"} for row in one["runtimes"].values())


def test_second_question(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("second_question", "--images", 1, "--threads", 1, writes=False,
        whole_model=lambda dtype, _: fastvlm.load(dtype=dtype))  # fmt: skip
    assert "the same tokens: 1 of 1" in capsys.readouterr().out


def test_training_step(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("training_step", "--threads", 1, writes=False, BATCH=4, ROUNDS=1)
    assert capsys.readouterr().out.count("forward pass") == 2


def test_data_workers(run: Run, photos: Path) -> None:
    Image.new("RGB", (1600, 1600)).save(photos / "images" / "0.jpg")
    found = run("data_workers", "--photos", photos / "images", "--workers", 0, "--rounds",
                1, "--steps", 1, "--batch", 1, "--size", 128, "--threads", 1, PIXELS=(64, 48),
                PHOTOS=2)  # fmt: skip
    assert 0 <= found["workers"]["0"]["waited_share"][0] <= 1


def test_structured(run: Run) -> None:
    pytest.importorskip("llguidance")
    found = run("structured", "--images", 1, "--limit", 12, "--threads", 1)
    # A model at random says what is no text, which the form "any text" leaves out.
    assert {"free", "any text"} < found["forms"].keys()
    assert all(
        one["same_as_without_drafts"]
        for form in found["forms"].values()
        for one in form["strategies"].values()
    )


def test_schemas(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    cases = [
        {"description": "a number", "schema": {"type": "integer", "maximum": 9, "minimum": 0}},
        {"description": "not read", "schema": {"not": {}}},
    ]
    (tmp_path / "draft7").mkdir()
    (tmp_path / "draft7" / "a.json").write_text(json.dumps(cases))
    found = run("schemas", "--suite", tmp_path, "--schemas", 4, "--limit", 20, "--threads", 1)
    assert found["schemas"]["of_the_suite_refused"] == 1
    for way in found["replies"].values():
        assert way["differ"] == way["invalid"] == []
        assert way["valid"] + len(way["cut"]) == way["asked"] > 0
    assert found["bad"]["schemas"] == found["bad"]["errors_of_openais_shape"] > 50


@pytest.mark.slow
def test_serving_load(run: Run, shipped: Path) -> None:
    pytest.importorskip("fastapi")
    found = run("serving_load", "--quick", "--model", shipped / "model", "--draft",
                shipped / "draft", "--size", 128, "--threads", 1, CLIENTS=(1, 2), TARGET_CLIENTS=2,
                OPEN_LOADS=(0.5,), QUICK_IMAGES=2)  # fmt: skip
    assert found["closed_loop"].keys() == {"1", "2"}
    assert found["replies"]["compared"] > 12
    assert found["replies"]["different"] == found["replies"]["failed"] == 0


@pytest.mark.slow
def test_serving_soak(run: Run, shipped: Path) -> None:
    pytest.importorskip("fastapi")
    found = run("serving_soak", "--minutes", 0.1, "--clients", 3, "--rest", 0.1, "--model",
                shipped / "model", "--draft", shipped / "draft", "--size", 128, "--threads", 1,
                IMAGES=4, MAX_TOKENS=4)  # fmt: skip
    assert found["slots_taken_at_the_end"] == 0
    ours, theirs = found["counts"]["replies"]
    assert ours == theirs > 0


@pytest.mark.slow
def test_serving_faults(run: Run) -> None:
    pytest.importorskip("fastapi")
    found = run("serving_faults", "--requests", 24)
    assert found["faults"] == []
    assert found["steady"]["same"] == found["steady"]["replies"]


@pytest.mark.slow
def test_encoder(run: Run) -> None:
    pytest.importorskip("timm")
    found = run("encoder", "--size", 64, "--rounds", 1, "--threads", 1)
    assert found["results"][0]["largest_difference"] < 1e-2


@pytest.mark.slow
def test_before_after(run: Run, photos: Path) -> None:
    source = ROOT / "src"
    found = run("before_after", "--before", source, "--after", source, "--limit", 1, "--cases",
                "single", "--photos", photos / "images")  # fmt: skip
    assert found["cases"]


@pytest.mark.slow
def test_loading(run: Run) -> None:
    def small(folder: Path) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, eos_token_id=1))
        model.bfloat16().save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)

    found = run("loading", "--only", "small", MODELS={"small": small})["models"]["small"]
    # What is loaded stays in its file until it is used.
    assert found["file_bytes"] > 4e7
    assert found["anonymous_bytes"] < 0.8 * found["file_bytes"]


def test_scale_simulation(run: Run) -> None:
    one, two = run("scale_simulation", "--replicas", "1,2")["fleets"]
    assert one["by image"]["cache_hits"] > 0.5
    assert two["by image"]["cache_hits"] > two["at random"]["cache_hits"]
    assert two["loss of a tenth"]["lost"] == 0
    assert two["twice the load"]["replicas_before"] == 1
    assert two["twice the load"]["replicas_after"] == 2


@pytest.mark.slow
def test_captioning(run: Run, photos: Path) -> None:
    found = run("captioning", photos / "images", "--limit", 5, "--rounds", 1, "--contenders",
                "plain,transformers", "--max-new-tokens", 4, FEW=2)  # fmt: skip
    assert found["images"] == 3
    assert all(one["different"] == 0 for one in found["contenders"].values())


@pytest.mark.slow
def test_caption_faults(
    photos: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, figures = script("caption_faults"), tmp_path / "figures.json"
    given = ["caption_faults", photos / "images", tmp_path, "--kills", 2, "--every", 2]
    options = ["--model", shipped / "model", "--draft", shipped / "draft", "--max-new-tokens", 4]
    words = [*given, "--json", figures, "--", *options, "--part-size", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    told = json.loads(figures.read_text())
    assert told["images"] == 6
    assert told["different"] == []
