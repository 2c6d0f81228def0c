"""`fastvlm benchmark` and `audit` on models of every kind, and where every verb computes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from fastvlm.cli.questions import DESCRIPTION_PROMPT
from fastvlm.cli.strategies import ALWAYS_MEASURED, STRATEGIES_WITHOUT_DRAFT
from fastvlm.cli.verbs import app
from fastvlm.functional.errors import InputError
from fastvlm.training import processes
from fastvlm.training.processes import compute_on
from tests.cli.conftest import Output
from tests.families import FAMILIES, ROTARY
from tests.processors import (
    NEWER_PROCESSORS,
    TEXT_TEMPLATE,
    character_tokenizer,
    sample_image,
    saved,
)

Cli = Callable[..., Output]
STRATEGIES = [*ALWAYS_MEASURED, *STRATEGIES_WITHOUT_DRAFT]
NEWER = [
    name
    for name in NEWER_PROCESSORS
    # Kosmos-2.5 sees 4,096 patches of any image, and the others aren't loaded in float64.
    if name not in ("gemma3", "kosmos-2.5", "paligemma2", "qwen3-vl-moe")
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        sample_image(number).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    "family",
    [
        *("llava", "qwen2.5-vl", "smolvlm", "blip2-opt", "blip2-t5", "gemma3"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in NEWER),
    ],
)
def test_a_family_is_measured_and_audited(
    cli: Cli, images: Path, tmp_path: Path, family: str
) -> None:
    model, figures, output = tmp_path / "model", tmp_path / "figures.json", tmp_path / "audit"
    saved(family, model)
    given = ("--model", model, "--images", images, "--prompt", "What?", "--max-new-tokens", 8,
             "--dtype", "float64")  # fmt: skip
    said = cli("benchmark", *given, "--json", figures)
    assert said.code == 0, said.err
    results = json.loads(figures.read_text())["results"]
    assert [result["strategy"] for result in results] == STRATEGIES
    for result in results:
        assert (result["replies"], result["identical"], result["different"]) == (2, True, 0)
    said = cli("audit", *given, "--output", output)
    assert said.code == 0, said.err
    audited = json.loads((output / "audit.json").read_text())["strategies"]
    assert set(audited) == set(STRATEGIES) - {"transformers"}
    assert all(row["identical"] == row["replies"] == 2 for row in audited.values())


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "smolvlm", "blip2-opt", "blip2-t5"])
def test_a_family_needs_no_images_and_no_prompt(cli: Cli, tmp_path: Path, family: str) -> None:
    model, figures = tmp_path / "model", tmp_path / "figures.json"
    saved(family, model)
    said = cli(
        "benchmark", "--model", model, "--strategies", "prompt-lookup", "--max-new-tokens", 4,
        "--dtype", "float64", "--json", figures, "--quiet",
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    found = json.loads(figures.read_text())
    assert (found["images"], found["prompts"]) == ("example", [DESCRIPTION_PROMPT])
    assert all(result["identical"] and result["replies"] == 2 for result in found["results"])


def test_a_model_that_says_nothing_is_measured(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two layers, none of which can be skipped, and an end token at once.
    monkeypatch.setitem(ROTARY, "num_hidden_layers", 2)
    model, _ = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    said = cli("benchmark", "--model", tmp_path, "--json", "-")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["images"] == "none"
    assert len(found["prompts"]) == found["results"][0]["replies"] > 1
    assert {result["speedup"] for result in found["results"]} == {None}


def test_prompts_of_several_kinds_are_measured_apart(cli: Cli, tmp_path: Path) -> None:
    model, _ = FAMILIES["llama"]()
    model.save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "prompts.jsonl"
    rows = [("list", "One"), ("story", "Two"), ("list", "Three")]
    file.write_text("\n".join(json.dumps({"kind": k, "prompt": text}) for k, text in rows))
    words = (
        "benchmark", "--model", tmp_path, "--prompts", file, "--strategies", "prompt-lookup",
        "--max-new-tokens", 6, "--dtype", "float64", "--json", "-",
    )  # fmt: skip
    for sampled in ((), ("--temperature", "1", "--seed", "3")):
        said = cli(*words, *sampled)
        assert said.code == 0, said.err
        found = json.loads(said.out)
        assert found["prompts"] == ["One", "Two", "Three"]
        assert (found["temperature"], found["seed"]) == ((1, 3) if sampled else (0, None))
        counts = {kind: {row["replies"] for row in rows} for kind, rows in found["kinds"].items()}
        assert counts == {"list": {2}, "story": {1}}
        assert all(row["identical"] for row in found["results"])
        measured = {row["strategy"] for row in found["results"]}
        assert ("transformers" in measured) is not bool(sampled)
    assert cli(*words, "--prompt", "Four").code == 2
    assert cli(*words[:-2], "--prompts", tmp_path / "none.jsonl").code == 1


def test_a_sampled_audit(cli: Cli, images: Path, tmp_path: Path) -> None:
    words = ("audit", "--images", images, "--max-new-tokens", 8, "--dtype", "float64")
    drawn = (*words, "--temperature", "1", "--seed", "4", "--output", tmp_path / "drawn")
    said = cli(*drawn)
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "drawn" / "audit.json").read_text())
    assert (found["temperature"], found["seed"]) == (1, 4)
    assert {"imitation", "imitation-mlp", "layer-skip"} <= found["strategies"].keys()
    assert all(row["identical"] == row["replies"] == 2 for row in found["strategies"].values())
    assert cli(*words, "--output", tmp_path / "greedy").code == 0
    first = [
        json.loads((tmp_path / name / "audit.jsonl").read_text().splitlines()[1])["replies"]
        for name in ("drawn", "greedy")
    ]
    assert first[0] != first[1]
    # The journal of other replies is not gone on with.
    assert "belongs to an audit" in cli(*words, "--output", tmp_path / "drawn").sentence()


def test_a_model_of_text_alone(cli: Cli, images: Path, tmp_path: Path) -> None:
    folder, figures = tmp_path / "text", tmp_path / "figures.json"
    model, _ = FAMILIES["llama"]()
    model.save_pretrained(folder)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer.save_pretrained(folder)
    asked = ("--model", folder, "--max-new-tokens", 6, "--dtype", "float64")
    prompts = ("--images", "none", "--prompt", "What?", "--prompt", "Who?")
    said = cli("benchmark", *asked, *prompts, "--json", figures)
    assert said.code == 0, said.err
    found = json.loads(figures.read_text())
    assert found["prompts"] == ["What?", "Who?"]
    assert all(result["identical"] and result["replies"] == 2 for result in found["results"])
    assert cli("audit", *asked, *prompts, "--output", tmp_path / "audit").code == 0
    said = cli("benchmark", *asked, "--images", images)
    assert said.code == 2
    assert "reads text alone" in said.sentence()


def verbs(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Yield each verb that there is, and the names of its options."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words), {name for option in command.params for name in option.opts}
    for name, one in (inner or {}).items():
        yield from verbs(one, (*words, name))


def test_every_verb_that_computes_says_where_and_in_what_precision() -> None:
    found = dict(verbs(typer.main.get_command(app)))
    assert found.keys() >= {
        "demo", "generate", "benchmark", "audit", "evaluate", "export onnx",
        "serve", "train draft", "train model",
    }  # fmt: skip
    for verb, options in found.items():
        assert options >= {"--device", "--dtype", "--threads", "--quiet"}, verb
        # What trains a model leaves the model, captions are files, and a server has metrics.
        assert ("--json" in options) == (verb not in ("train model", "caption", "serve")), verb


@pytest.mark.parametrize("device", ["telephone", "cuda:99", "meta", "cpu:x"])
@pytest.mark.parametrize(
    "words",
    [
        ("demo",),
        ("generate", "a.png"),
        ("benchmark",),
        ("audit", "--output", "o"),
        ("evaluate", "--tasks", "coco", "--data", "d", "--output", "o"),
        ("export", "onnx", "f"),
        ("train", "draft", "--data", "d", "--output", "o"),
        ("train", "model", "--data", "d", "--output", "o"),
    ],
)
def test_a_device_that_is_not_there(cli: Cli, words: tuple[str, ...], device: str) -> None:
    said = cli(*words, "--device", device)
    assert said.code == 2
    assert device in said.sentence()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_a_reply_in_another_precision(cli: Cli, shipped: Path, dtype: str) -> None:
    file = shipped / "images" / "0.png"
    words = ("generate", file, "--max-new-tokens", 4, "--device", "cpu", "--dtype", dtype)
    assert cli(*words).code == 0


def test_a_sampled_reply_is_one_of_its_seed(cli: Cli, shipped: Path) -> None:
    words = ("generate", shipped / "images" / "0.png", "--max-new-tokens", 12, "--temperature", 1)
    said = [
        cli(*words, "--seed", 3, "--strategy", strategy).out
        for strategy in ("autoregressive", "imitation", "layer-skip", "prompt-lookup")
    ]
    assert said == said[:1] * 4
    assert cli(*words, "--seed", 4).out != said[0]


@pytest.fixture
def _without_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what is set of a run's device be forgotten."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # Accelerate takes one precision for all runs of a process.
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_without_choice")
def test_a_run_is_on_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"cpu": torch.device("cpu"), "cuda": torch.device("cuda:0")}
    place = SimpleNamespace(device=places["cpu"], num_processes=1)
    monkeypatch.setattr(processes, "this_process", lambda: place)
    compute_on(None)
    assert "ACCELERATE_USE_CPU" not in os.environ
    compute_on("cpu")
    assert parse_flag_from_env("ACCELERATE_USE_CPU")
    with pytest.raises(InputError, match="computes on cpu already; cuda was asked for"):
        compute_on("cuda")
    place.device = places["cuda"]
    compute_on("cuda")
    compute_on("cuda:0")
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cuda:0"
    with pytest.raises(InputError, match="computes on cuda:0 already"):
        compute_on("cuda:1")
    place.num_processes = 2
    with pytest.raises(InputError, match="leave the number out"):
        compute_on("cuda:0")


@pytest.mark.usefixtures("_without_choice")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_draft_is_trained_on_the_cpu_in_a_precision(
    cli: Cli, shipped: Path, tmp_path: Path, dtype: str
) -> None:
    said = cli(
        "train", "draft", "--model", shipped / "model", "--data", "scenes:4", "--held-out", "2",
        "--kind", "mlp", "--draft-vocabulary", "50", "--steps", "2", "--output", tmp_path,
        "--device", "cpu", "--dtype", dtype, "--workers", "0",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert parse_flag_from_env("ACCELERATE_USE_CPU")
    assert (tmp_path / "mlp" / "model.safetensors").is_file()
