"""What is typed wrong gets one sentence and a non-zero exit code."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from fastvlm import cli as command_line
from fastvlm.cli import running
from fastvlm.cli.installation import torchvision_mismatch
from fastvlm.functional.errors import CheckpointError
from tests.cli.conftest import CONTEXT, Output

Cli = Callable[..., Output]


@pytest.fixture
def image(shipped: Path) -> Path:
    return shipped / "images" / "0.png"


def test_a_file_that_is_no_image(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "text.png"
    file.write_text("not an image")
    said = cli("generate", file)
    assert said.code == 1
    assert str(file) in said.sentence()


def test_a_image_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    said = cli("generate", tmp_path / "none.png")
    assert said.code == 1
    assert "There is no image at" in said.sentence()


def test_a_truncated_image(cli: Cli, broken: Path) -> None:
    said = cli("generate", broken)
    assert said.code == 1
    assert f"{broken} can't be decoded as an image" in said.sentence()


@pytest.mark.parametrize("option", ["--model", "--draft"])
def test_a_model_or_a_draft_that_is_not_there(
    cli: Cli, image: Path, tmp_path: Path, option: str
) -> None:
    said = cli("generate", image, option, tmp_path / "none")
    assert said.code == 1
    assert f"There is no {option[2:]} in {tmp_path / 'none'}" in said.sentence()


def test_a_relative_path_is_no_name_on_the_hub(
    cli: Cli, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    said = cli("generate", image, "--model", "runs/modle")
    assert said.code == 1
    assert "There is no model in runs/modle" in said.sentence()


def test_a_broken_model(cli: Cli, image: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    said = cli("generate", image, "--model", tmp_path)
    assert said.code == 1
    assert str(tmp_path / "config.json") in said.sentence()


def test_a_draft_for_another_model(cli: Cli, image: Path, shipped: Path) -> None:
    words = ("generate", image, "--model", shipped / "other", "--draft", shipped / "draft")
    said = cli(*words)
    assert said.code == 0
    assert any(line.startswith("fastvlm: ") for line in said.err.splitlines())


def test_a_prompt_longer_than_the_context(cli: Cli, image: Path) -> None:
    said = cli("generate", image, "--prompt", "word " * CONTEXT)
    assert said.code == 1
    assert f"the model's context is {CONTEXT}" in said.sentence()
    said = cli("generate", image, image, "--prompt", "word " * CONTEXT)
    assert (said.code, said.out) == (1, "")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a.png", "--max-new-tokens", "0"),
        ("generate", "a.png", "--confidence", "1.5"),
        ("generate", "a.png", "--num-speculative-tokens", "many"),
        ("generate", "a.png", "--threads", "0"),
        ("benchmark", "--limit", "-1"),
        ("demo", "--images", "0"),
    ],
)
def test_an_option_out_of_range(cli: Cli, words: tuple[str, ...]) -> None:
    said = cli(*words)
    assert said.code == 2
    assert f"Invalid value for '{words[-2]}'" in said.sentence()


@pytest.mark.parametrize(
    "words", [("generate",), ("generate", "a.png", "--colour"), ("describe", "a.png")]
)
def test_a_command_line_that_makes_no_sense(cli: Cli, words: tuple[str, ...]) -> None:
    said = cli(*words)
    assert said.code == 2
    assert said.sentence()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--strategies", "telepathy"), 2, "The strategies here are autoregressive, imitation"),
        (("--strategies", "imitation-2"), 2, "needs a draft of that name"),
        (("--strategies", "early-exit@9"), 2, "between 1 and 4"),
        (("--draft", "prompt-lookup=x"), 2, "can't be called 'prompt-lookup'"),
        (("--draft", "x", "--draft", "y"), 2, "Two drafts are called 'imitation'"),
        (("--skipped-layers", "3,x"), 2, "as in 3,5,7; got '3,x'"),
        (("--skipped-layers", "3", "--strategies", "prompt-lookup"), 2, "--skipped-layers is for"),
        (("--images", "none"), 2, "needs a --prompt"),
        (("--listing", "/nowhere"), 2, "--images"),
        (("--json", "/nowhere/figures.json"), 1, "There is no folder /nowhere"),
        (("--images", "/nowhere"), 1, "/nowhere"),
        (("--images", "/", "--listing", "/nowhere"), 1, "/nowhere"),
    ],
)
def test_a_benchmark_that_can_not_be_run(
    cli: Cli, words: tuple[str, ...], code: int, told: str
) -> None:
    said = cli("benchmark", *words)
    assert said.code == code
    assert told in said.sentence()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seed", "3"), "seed needs a temperature"),
        (("--temperature", "1e-40"), "temperature is 0, or one that"),
        (("--seed", str(2**64), "--temperature", "1"), "seed"),
        (("--skipped-layers", "1", "--strategies", "early-exit"), "--skipped-layers is for"),
    ],
)
def test_an_audit_that_can_not_be_run(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    said = cli("audit", "--output", tmp_path / "out", *words)
    assert said.code == 2
    assert told in said.sentence()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--strategy", "telepathy"), "got 'telepathy'"),
        (("--strategy", "autoregressive", "--confidence", ".5"), "no option 'confidence' here"),
        (("--strategy", "early-exit", "--skipped-layers", "1"), "no option 'skipped_layers' here"),
        (("--strategy", "autoregressive", "--num-speculative-tokens", "3"), "takes none"),
        (("--skipped-layers", "1"), "no option 'skipped_layers' here"),
        (("--strategy", "layer-skip", "--skipped-layers", "1,5"), "layers of this model are 0 to"),
        (("--top-p", ".5"), "top_p needs a temperature"),
        (("--seed", "3"), "seed needs a temperature"),
        (("--seed", str(2**64), "--temperature", "1"), "seed"),
        (("--temperature", "1e-40"), "temperature is 0, or one that"),
        (("--stop", ""), "at least one character"),
    ],
)
def test_options_that_nothing_takes(
    cli: Cli, image: Path, words: tuple[str, ...], told: str
) -> None:
    said = cli("generate", image, *words)
    assert said.code == 2
    assert told in said.sentence()


@pytest.mark.parametrize("listing", [None, "{", '[{"file": "0.png"}]', "[]"])
def test_a_demo_without_its_images(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str | None
) -> None:
    monkeypatch.setattr("fastvlm_example.IMAGES", tmp_path)
    if listing is not None:
        (tmp_path / "images.json").write_text(listing)
    said = cli("demo")
    assert said.code == 1
    assert "images.json" in said.sentence()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--model"),
        (("--model", "a", "--encoder", "b", "--decoder", "c"), "--model"),
        (("--encoder", "/nowhere"), "--model"),
        (("--encoder", "/nowhere", "--decoder", "c"), "There is no encoder in /nowhere"),
        (("--model", "/nowhere/a"), "There is no model in /nowhere/a"),
        (("--model", "SHIPPED", "--data", "/nowhere"), "There is no data set at /nowhere"),
        (("--model", "SHIPPED", "--image-size", "100"), "a multiple of 64 pixels; got 100"),
        (("--model", "SHIPPED", "--stage", "2"), "the model's context is 256"),
        (("--model", "OUTPUT"), "--output"),
    ],
)
def test_a_model_that_can_not_be_trained(
    cli: Cli, shipped: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    places = {"SHIPPED": shipped / "model", "OUTPUT": tmp_path}
    output = tmp_path if "OUTPUT" in words else tmp_path / "out"
    given = [places.get(word, word) for word in words]
    said = cli("train", "model", "--data", "scenes:2", "--output", output, *given)
    assert said.code == (2 if told.startswith("--") else 1)
    assert told in said.sentence()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "scenes:9", "--phases", "joint,frozen", "--prompt", "?"), "--prompt"),
        (
            ("--data", "scenes:9", "--phases", "joint,frozen", "--exit-layer", "auto"),
            "--exit-layer",
        ),
        (("--data", "scenes:4", "--kind", "tree"), "--kind"),
        (("--data", "scenes:4", "--exit-layer", "5"), "--exit-layer"),
        (("--data", "scenes:4", "--exit-layer", "-1"), "--exit-layer"),
        (("--data", "scenes:4"), "4 questions"),
        (("--data", "/nowhere"), "/nowhere"),
        (("--data", "scenes:9", "--replies", "data", "--temperature", "1"), "--temperature"),
        (
            ("--data", "scenes:9", "--phases", "joint,frozen", "--dtype", "float16"),
            "--dtype",
        ),
    ],
)
def test_a_draft_that_can_not_be_trained(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    said = cli("train", "draft", *words, "--output", tmp_path / "out")
    assert said.code == (2 if told.startswith("--") else 1)
    assert told in said.sentence()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--dtype", "int4"), 2, "--dtype"),
        (("--layout", "gguf"), 2, "--layout"),
        (("--layout", "transformers"), 1, "fastvit_mci3"),
    ],
)
def test_a_conversion_that_can_not_be(
    cli: Cli, shipped: Path, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    said = cli("convert", shipped / "model", tmp_path / "made", *words)
    assert said.code == code
    assert told in said.sentence()
    assert not (tmp_path / "made").exists()
    said = cli("convert", shipped / "model", shipped / "other")
    assert "exists already" in said.sentence()
    said = cli("convert", "/nowhere", tmp_path / "made")
    assert "There is no model in /nowhere" in said.sentence()


def test_ctrl_c_is_quiet(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "invoked", interrupted)
    assert cli("demo") == Output(130, "", "")


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(["--no-such-option"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("fastvlm: ")


INSTALLED = {"torchvision": "0.20.1", "torch": "2.13.0+cpu"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
    ],
)
def test_a_torchvision_of_another_torch_is_explained(error: Exception) -> None:
    wrapped = CheckpointError("The model x can't be loaded: Could not import module 'AutoModel'.")
    wrapped.__cause__ = ModuleNotFoundError("Could not import module 'AutoModel'.")
    wrapped.__cause__.__cause__ = error
    for seen in (error, wrapped):
        told = torchvision_mismatch(
            seen, INSTALLED.__getitem__, lambda _: ["numpy", "torch==2.5.1"]
        )
        assert told is not None
        assert "torchvision 0.20.1, which was built for torch 2.5.1," in told
        assert "installed torch 2.13.0;" in told
        assert "pip uninstall torchvision" in told


def test_other_errors_are_not_blamed_on_torchvision() -> None:
    assert torchvision_mismatch(RuntimeError("out of memory"), INSTALLED.__getitem__) is None


def test_a_torchvision_that_is_not_installed_is_not_blamed() -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert torchvision_mismatch(ImportError("No module named 'torchvision'"), missing) is None


def test_a_torchvision_that_does_not_fit_is_told_in_one_sentence(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(running, "invoked", broken)
    monkeypatch.setattr(metadata, "version", INSTALLED.__getitem__)
    monkeypatch.setattr(
        running, "torchvision_mismatch",
        lambda error: torchvision_mismatch(error, INSTALLED.__getitem__, lambda _: None),
    )  # fmt: skip
    said = cli("demo")
    assert said.code == 1
    assert "torchvision 0.20.1 doesn't work with the installed torch 2.13.0" in said.err
    assert said.err.count("\n") == 1
