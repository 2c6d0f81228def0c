"""`fastvlm serve`: what it makes of its options before it listens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from fastvlm.cli.loading import Runtime
from fastvlm.cli.verbs import app
from fastvlm.functional.cores import usable_cores
from tests.cli.conftest import Output


@pytest.mark.parametrize(
    ("options", "threads"), [((), max(usable_cores() - 1, 1)), (("--threads", "7"), 7)]
)
def test_a_core_is_left_to_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], threads: int
) -> None:
    process = pytest.importorskip("fastvlm.serving.process", reason="serving is not installed")
    asked: list[int | None] = []

    class Loading:
        """Loads the model, and ends."""

        def __init__(self, load: Callable[[], Any], *_: Any) -> None:
            self.load = load

        def serve_until_stopped(self) -> None:
            with pytest.raises(LookupError):
                self.load()

    def load(runtime: Runtime, *_: Any, **__: Any) -> None:
        asked.append(runtime.threads)
        raise LookupError

    monkeypatch.setattr(process, "Process", Loading)
    monkeypatch.setattr(Runtime, "load", load)
    done = CliRunner().invoke(app, ["serve", *options])
    assert (done.exit_code, asked) == (0, [threads]), done.output


@pytest.mark.parametrize("options", [("--replicas", "2"), ("--address", "auto")])
def test_replicas_need_ray(
    cli: Callable[..., Output], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    pytest.importorskip("fastvlm.serving.process", reason="serving is not installed")
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)
    said = cli("serve", *options)
    assert said.code == 1
    assert "pip install 'fastvlm[ray]'" in said.sentence()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--replicas", "3", "--max-replicas", "2"), 2, "--max-replicas"),
        (("--model", "m", "--draft-refresh", "5"), 2, "--draft-refresh"),
        (("--address", "auto"), 1, "--api-key-file"),
    ],
)
def test_options_that_contradict(
    cli: Callable[..., Output],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    told: str,
) -> None:
    pytest.importorskip("fastvlm.serving.process", reason="serving is not installed")
    monkeypatch.setenv("FASTVLM_API_KEY", "secret")
    monkeypatch.setattr("fastvlm.cluster.connection.needed_ray", lambda _: None)
    said = cli("serve", *options)
    assert (said.code, told in said.sentence()) == (code, True)
