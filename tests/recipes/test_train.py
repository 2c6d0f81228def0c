"""The script that makes the example model, where it can't start."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvlm.cli import run

SCRIPT = Path(__file__).parents[2] / "recipes" / "example-model" / "train.py"


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("example_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.app


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("encoder",), 1, "Flickr8k"),
        (("encoder", "--learning-rate", "0"), 2, "--learning-rate"),
        (("model",), 2, "--encoder"),
        (("model", "--encoder", "e", "--tune-encoder"), 2, "--tune-encoder"),
        (("questions",), 1, "Flickr8k"),
        (("questions", "--scenes", "-1"), 2, "--scenes"),
        (("model", "--encoder", "e", "--stage", "last"), 2, "--stage"),
        (("model", "--encoder", "/nowhere"), 1, "/nowhere"),
    ],
)
def test_a_training_that_can_not_start(
    app: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    told: str,
) -> None:
    given = [*words, "--photos", str(tmp_path), "--output", str(tmp_path / "out")]
    assert run(given, app) == code
    assert told in capsys.readouterr().err
