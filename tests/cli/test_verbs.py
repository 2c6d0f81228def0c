"""What the verbs print and write."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM

import fastvlm
import fastvlm_example
from fastvlm.cli.streaming import THUMBNAIL_CELLS, ReplyWriter, thumbnail
from fastvlm.prompts import question
from fastvlm_example.scenes import render, sample
from tests.cli.conftest import Output
from tests.families import replies
from tests.processors import asked, saved
from tests.training import teachers

SOURCES = Path(__file__).parents[2] / "src"
FIELDS = {
    "strategy",
    "identical",
    "speedup",
    "speedup_vs_transformers",
    "acceptance_length",
    "acceptance_rate",
    "ttft_ms",
    "tpot_ms",
}
Cli = Callable[..., Output]


def expected_reply(shipped: Path, image: Path, prompt: str, limit: int) -> str:
    """Return the reply of transformers' own generate."""
    vlm = fastvlm.load(shipped / "model")
    inputs = vlm.prompts.inputs(question(prompt, image))
    out = vlm.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    reply = out[0, inputs["input_ids"].shape[1] :]
    return vlm.tokenizer.decode(reply, skip_special_tokens=True).lstrip()


def test_help_lists_the_verbs(cli: Cli) -> None:
    said = cli("--help")
    assert said.code == 0
    for verb in ("demo", "generate", "benchmark", "convert", "train"):
        assert verb in said.out


def test_training_lists_its_stages(cli: Cli) -> None:
    said = cli("train", "--help")
    assert said.code == 0
    for stage in ("model", "draft", "encoder"):
        assert stage in said.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"fastvlm {fastvlm.__version__}\n"


def test_help_needs_no_torch() -> None:
    # The package's face is left out here: what is tested is the command line's own imports.
    code = (
        "import sys, types; package = types.ModuleType('fastvlm');"
        f"package.__path__ = [{str(SOURCES / 'fastvlm')!r}]; sys.modules['fastvlm'] = package;"
        "from fastvlm.cli import run; code = run(['generate', '--help']);"
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "strategy",
    ["autoregressive", "imitation", "cascade", "early-exit", "layer-skip", "prompt-lookup"],
)
def test_a_reply_is_that_of_transformers(cli: Cli, shipped: Path, strategy: str) -> None:
    image, prompt = shipped / "images" / "0.png", "What is it?"
    said = cli(
        "generate", image, "--prompt", prompt, "--max-new-tokens", 12, "--strategy", strategy
    )
    assert said == Output(0, expected_reply(shipped, image, prompt, 12) + "\n", "")


def test_another_runtime_gives_the_same_reply(cli: Cli, shipped: Path) -> None:
    pytest.importorskip("onnxruntime")
    image, prompt = shipped / "images" / "0.png", "What is it?"
    asked = ("generate", image, "--prompt", prompt, "--max-new-tokens", 12, "--runtime", "onnx")
    assert cli(*asked) == Output(0, expected_reply(shipped, image, prompt, 12) + "\n", "")
    with_draft = cli(*asked, "--quantize", "int4")
    without = cli(*asked, "--quantize", "int4", "--strategy", "autoregressive")
    assert with_draft == without
    assert with_draft.code == 0
    said = cli("generate", image, "--runtime", "onnx", "--dtype", "bfloat16").sentence()
    assert "computes in float32 on the CPU" in said


def test_layers_to_skip_are_given(cli: Cli, shipped: Path, tmp_path: Path) -> None:
    image, figures = shipped / "images" / "0.png", tmp_path / "figures.json"
    given = ("--skipped-layers", "1, 3")
    said = cli(
        "generate", image, "--max-new-tokens", 8, "--strategy", "layer-skip", *given, "--stats"
    )
    assert said.code == 0
    assert "drafted tokens accepted" in said.err
    said = cli(
        "benchmark", "--limit", 1, "--max-new-tokens", 4, "--strategies", "layer-skip", *given,
        "--json", figures,
    )  # fmt: skip
    assert said.code == 0
    assert json.loads(figures.read_text())["strategies"]["layer-skip"]["skipped_layers"] == [1, 3]


def test_a_given_model_is_used_without_a_draft(cli: Cli, shipped: Path) -> None:
    image = shipped / "images" / "0.png"
    said = cli("generate", image, "--model", shipped / "other", "--max-new-tokens", 8, "--stats")
    assert said.code == 0
    assert re.fullmatch(r".+: \d+ tokens, TTFT [\d.]+ ms, TPOT [\d.]+ ms\n", said.err)


def test_a_model_of_another_family_uses_its_own_processor(
    cli: Cli, shipped: Path, tmp_path: Path
) -> None:
    model, processor = saved("llava", tmp_path)
    file = shipped / "images" / "0.png"
    said = cli("generate", file, "--model", tmp_path, "--prompt", "What?", "--max-new-tokens", 8)
    [expected] = replies(model, asked(processor, ["What?"], [Image.open(file)]), 8)
    assert said.out == processor.decode(expected, skip_special_tokens=True).lstrip() + "\n"
    assert (said.code, said.err) == (0, "")


def test_a_broken_image_does_not_lose_the_others(cli: Cli, shipped: Path, broken: Path) -> None:
    one, two = (shipped / "images" / f"{number}.png" for number in range(2))
    said = cli("generate", one, broken, two, "--prompt", "What?", "--max-new-tokens", 8)
    assert said.code == 1
    replies = [expected_reply(shipped, image, "What?", 8) for image in (one, two)]
    assert said.out == f"{one}: {replies[0]}\n{two}: {replies[1]}\n"
    assert said.err.startswith(f"fastvlm: {broken} can't be decoded as an image")
    assert said.err.count("\n") == 1


def test_the_benchmark_measures_every_strategy(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    said = cli("benchmark", "--limit", 2, "--max-new-tokens", 6, "--json", file)
    assert said.code == 0
    figures = json.loads(file.read_text())
    assert {"hardware", "images", "prompts", "limit", "date", "results"} <= figures.keys()
    assert figures["images"] == "scenes"
    assert figures["prompts"] == [fastvlm_example.SCENE_PROMPT]
    results = {result["strategy"]: result for result in figures["results"]}
    assert list(results) == [
        "transformers",
        "autoregressive",
        "imitation",
        "imitation-mlp",
        "cascade",
        "early-exit",
        "layer-skip",
        "prompt-lookup",
    ]
    # They were searched for: the first and the last of five layers always draft.
    assert set(figures["strategies"]["layer-skip"]["skipped_layers"]) <= {1, 2, 3}
    for name, result in results.items():
        assert result.keys() >= FIELDS
        assert result["identical"] is True
        assert name in said.out
    assert figures["strategies"]["imitation-mlp"]["network"]["kind"] == "mlp"
    assert not list(tmp_path.glob("*.partial"))


def test_a_listing_names_the_photos_to_measure_with(
    cli: Cli, shipped: Path, tmp_path: Path
) -> None:
    listing = tmp_path / "dev.txt"
    listing.write_text("1.png\n")
    figures = tmp_path / "figures.json"
    said = cli(
        "benchmark", "--images", shipped / "images", "--listing", listing,
        "--strategies", "prompt-lookup", "--max-new-tokens", 4, "--json", figures,
    )  # fmt: skip
    assert said.code == 0
    assert {result["replies"] for result in json.loads(figures.read_text())["results"]} == {1}


def test_the_benchmark_compares_named_drafts_on_photos(
    cli: Cli, shipped: Path, broken: Path
) -> None:
    folder = broken.parent
    (folder / "whole.png").write_bytes((shipped / "images" / "1.png").read_bytes())
    figures = folder / "figures.json"
    words = (
        "benchmark", "--model", shipped / "model", "--draft", f"ours={shipped / 'draft'}",
        "--draft", shipped / "draft-mlp", "--strategies", "ours,imitation", "--images", folder,
        "--prompt", "What?", "--max-new-tokens", 4, "--json", figures,
    )  # fmt: skip
    said = cli(*words)
    assert said.code == 1
    assert str(broken) in said.err
    assert not figures.exists()  # half of the images are more than may fail
    said = cli(*words, "--max-failed", 0.5)
    assert said.code == 1  # an image was left out, which is said
    assert str(broken) in said.err
    found = json.loads(figures.read_text())
    assert [one["image"] for one in found["failed"]] == [str(broken)]
    assert [result["strategy"] for result in found["results"]] == [
        "transformers",
        "autoregressive",
        "ours",
        "imitation",
    ]


def test_the_demo_in_a_pipe_is_plain(cli: Cli) -> None:
    said = cli("demo")
    assert (said.code, said.err) == (0, "")
    assert "\x1b" not in said.out
    assert "1/2  A scene" in said.out
    assert "Jane Doe, CC BY 2.0, https://example.org/1" in said.out
    assert len(re.findall(r"^  identical: TTFT", said.out, re.MULTILINE)) == 2
    assert "2 of 2" in said.out


def test_the_demo_tells_tokens_apart_by_colour(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = cli("demo", "--images", 1)
    assert said.code == 0
    assert "\x1b[32mthese tokens were drafted and accepted\x1b[0m" in said.out
    assert "▀" in said.out


def test_the_demo_as_json_is_one_object(cli: Cli) -> None:
    said = cli("demo", "--json", "-", "--images", 1)
    figures = json.loads(said.out)
    assert {"processor", "threads", "torch"} <= figures["hardware"].keys()
    assert [result["strategy"] for result in figures["results"]] == [
        "transformers",
        "autoregressive",
        "cascade",
    ]
    for result in figures["results"]:
        assert result.keys() >= FIELDS


def test_a_streamed_reply_is_wrapped_at_words() -> None:
    console = Console(width=24, record=True, file=io.StringIO())
    writer = ReplyWriter(console, indent=4)
    for piece in ("A sm", "all red", " square ", "is\nabove it", ", and so", " on."):
        writer.write(piece)
    writer.close()
    assert console.export_text() == ("    A small red square\n    is above it, and so\n    on.\n")


@pytest.mark.parametrize(("size", "lines"), [((90, 90), 12), ((160, 40), 3), ((20, 100), 12)])
def test_a_thumbnail_keeps_the_shape_of_a_image(size: tuple[int, int], lines: int) -> None:
    drawn = thumbnail(render(sample(0), 192).resize(size)).plain.split("\n")
    assert len(drawn) == lines
    assert max(map(len, drawn)) == (THUMBNAIL_CELLS if size[0] >= size[1] else 5)


def test_a_converted_checkpoint_is_the_same_model(cli: Cli, shipped: Path, tmp_path: Path) -> None:
    said = cli("convert", shipped / "model", tmp_path / "made", "--dtype", "float32")
    assert (said.code, said.err) == (0, "")
    assert "parameters in float32, in the layout fastvlm." in said.out
    state = fastvlm.load(tmp_path / "made").model.state_dict()
    for name, tensor in fastvlm.load(shipped / "model").model.state_dict().items():
        assert state[name].equal(tensor)
    assert not (tmp_path / "made.partial").exists()


def test_a_draft_is_trained_and_serves_its_model(cli: Cli, shipped: Path, tmp_path: Path) -> None:
    words = (
        "train", "draft", "--model", shipped / "model", "--data", "scenes:6", "--held-out", "2",
        "--kind", "mlp", "--exit-layer", "auto", "--draft-vocabulary", "50", "--steps", "5",
        "--workers", "0", "--output", tmp_path,
    )  # fmt: skip
    said = cli(*words, "--json", tmp_path / "figures.json")
    assert said.code == 0, said.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["drafts"]["mlp"]["acceptance_length"] >= 1
    assert "4 replies. None of 6 records is broken." in said.out
    assert said.out.count("(taken)") == 1
    card = (tmp_path / "mlp" / "README.md").read_text()
    assert "acceptance length" in card
    assert "scenes:6" in card
    # Everything is there: the same command does no step again.
    weights = (tmp_path / "mlp" / "model.safetensors").read_bytes()
    log = (tmp_path / "log.jsonl").read_text()
    again = cli(*words, "--quiet")
    assert (again.code, again.err) == (0, "")
    assert (tmp_path / "mlp" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "log.jsonl").read_text() == log
    image = shipped / "images" / "0.png"
    told = cli("generate", image, "--model", shipped / "model", "--draft", tmp_path / "mlp")
    assert told.code == 0
    assert told.out == cli("generate", image, "--model", shipped / "model").out


def test_a_model_is_trained_stage_after_stage(cli: Cli, shipped: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    data = tmp_path / "data"
    data.mkdir()
    for number in range(6):
        render(sample(number), 64).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a red circle")
    words = ("train", "model", "--data", data, "--batch", "3", "--image-size", "128")
    said = cli(*words, "--stage", "1", "--model", shipped / "model", "--output", first)
    assert said.code == 0, said.err
    assert "Stage 1 (projector), 2 steps of 3; saved in" in said.out
    more = ("--learns", "decoder", "--steps", "3", "--gradient-checkpointing", "--workers", "0")
    said = cli(*words, "--stage", "2", *more, "--model", first, "--output", second)
    assert said.code == 0, said.err
    assert "Stage 2 (decoder), 3 steps of 3; saved in" in said.out
    told = cli("generate", shipped / "images" / "0.png", "--model", second)
    assert told.code == 0
    made = (*words, "--stage", "1", "--encoder", second, "--decoder", tmp_path / "text")
    vlm = fastvlm.load(shipped / "model")
    config = vlm.model.config.get_text_config()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    vlm.tokenizer.save_pretrained(tmp_path / "text")
    said = cli(*made, "--workers", "0", "--output", tmp_path / "new")
    assert said.code == 0, said.err
    assert fastvlm.load(tmp_path / "new").image_size == 128


def test_an_encoder_is_taught_and_becomes_a_models(cli: Cli, shipped: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(5):
        render(sample(number), 64).save(data / f"{number}.png")
    taught = tmp_path / "encoder"
    words = (
        "train", "encoder", "--teacher", f"{teachers.FILE}:grid", "--data", data, "--data",
        "scenes:3", "--held-out", "2", "--steps", "3", "--batch", "4", "--image-size", "64",
        "--start", shipped / "model", "--workers", "0", "--output", taught,
    )  # fmt: skip
    said = cli(*words, "--json", tmp_path / "figures.json")
    assert said.code == 0, said.err
    assert "6 images. None of 8 records is broken." in said.out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 6
    assert set(figures["held_out"]) == {
        "held-out pooled explained", "held-out pooled cosine", "held-out grid explained",
        "held-out grid cosine", "held-out same class",
    }  # fmt: skip
    assert "scenes:3; 6 images" in (taught / "README.md").read_text()
    # Everything is there: the same command does no step again.
    weights = (taught / "model.safetensors").read_bytes()
    assert cli(*words, "--quiet").code == 0
    assert (taught / "model.safetensors").read_bytes() == weights
    vlm = fastvlm.load(shipped / "model")
    config = vlm.model.config.get_text_config()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    vlm.tokenizer.save_pretrained(tmp_path / "text")
    for number in range(5):
        (data / f"{number}.txt").write_text("a red circle")
    said = cli(
        "train", "model", "--data", data, "--batch", "2", "--image-size", "128", "--steps", "1",
        "--stage", "1", "--encoder", taught, "--decoder", tmp_path / "text", "--workers", "0",
        "--output", tmp_path / "made",
    )  # fmt: skip
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (("--variant", "tiny"), 2, "fastvithd-small"),
        (("--variant", "fastvithd", "--start", "d"), 2, "--variant"),
        (("--start", "nowhere"), 1, "nowhere"),
        (("--image-size", "100"), 1, "multiple of 64"),
        (("--teacher-mean", "1,2"), 2, "--teacher-mean"),
        (("--teacher-size", "16", "--start", "{model}"), 1, "can't take images"),
        (("--held-out", "4", "--start", "{model}"), 1, "--held-out"),
        (("--data", "nowhere", "--start", "{model}"), 1, "nowhere"),
    ],
)
def test_an_encoder_that_can_not_be_taught(
    cli: Cli, shipped: Path, tmp_path: Path, more: tuple[str, ...], code: int, told: str
) -> None:
    given = [one.format(model=shipped / "model") for one in more]
    said = cli(
        "train", "encoder", "--teacher", f"{teachers.FILE}:grid", "--data", "scenes:4", "--output",
        tmp_path / "out", *given,
    )  # fmt: skip
    assert said.code == code
    assert told in next(line for line in said.err.splitlines() if line.startswith("fastvlm: "))


def test_a_target_is_fine_tuned_before_its_draft(cli: Cli, shipped: Path, tmp_path: Path) -> None:
    said = cli(
        "train", "draft", "--model", shipped / "model", "--data", "scenes:5", "--held-out", "2",
        "--kind", "mlp", "--draft-vocabulary", "50", "--steps", "2", "--output", tmp_path,
        "--phases", "joint,frozen", "--joint-steps", "2", "--joint-learning-rate", "1e-3",
        "--workers", "0",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "The target, fine-tuned with exit 1, is saved in" in said.out
    image = shipped / "images" / "0.png"
    tuned = tmp_path / "model"
    told = cli("generate", image, "--model", tuned, "--draft", tmp_path / "mlp")
    assert told.code == 0, told.err
    assert told.out == cli("generate", image, "--model", tuned).out
    # The draft is for the new target: the old one's tokens are its own, but it is warned.
    old = ("generate", image, "--model", shipped / "model")
    told = cli(*old, "--draft", tmp_path / "mlp")
    assert told.code == 0, told.err
    assert any(line.startswith("fastvlm: ") for line in told.err.splitlines())
    assert told.out == cli(*old).out
