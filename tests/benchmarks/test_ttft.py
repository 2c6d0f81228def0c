"""The time to first token: what is counted, how it is taken apart, and how a run goes on."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import ttft_models
import ttft_stages
from fastvlm.functional.errors import InputError
from fastvlm.vision.configuration import VARIANTS
from tests.models import LIVELY
from ttft_models import TEXT_AFTER, TEXT_BEFORE, Contender, Contenders
from ttft_report import markdown, plot, rows

# GFLOP of the encoder, by side in pixels (an architecture's own arithmetic, counted elsewhere).
FASTVITHD = {256: 29.6, 512: 119.1, 768: 270.4, 1024: 486.7, 1152: 620.6, 1536: 1133.6}


@pytest.fixture(scope="module")
def shells() -> dict[str, Contender]:
    with torch.device("meta"):
        return {name: build() for name, build in Contenders("meta").all()}


def test_the_encoders_arithmetic(shells: dict[str, Contender]) -> None:
    for side, gflop in FASTVITHD.items():
        described = ttft_stages.describe(shells[f"FastVLM-0.5B {side}"])
        assert described["gflop"]["vision"] == pytest.approx(gflop, abs=0.06)
        assert described["visual_tokens"] == (side // 64) ** 2
        assert described["parameters"]["decoder"] == 494_032_768


def test_the_peers_are_those_of_the_papers(shells: dict[str, Contender]) -> None:
    onevision = ttft_stages.describe(shells["LLaVA-OneVision-0.5B 1152"])
    assert onevision["visual_tokens"] == 7371
    assert onevision["gflop"]["vision"] == pytest.approx(6418, rel=1e-3)
    # 3.4 times as large as FastViTHD (arXiv 2412.13303), whose 125 M count CLIP's head.
    assert onevision["parameters"]["vision"] / 125.1e6 == pytest.approx(3.2, abs=0.2)
    assert ttft_stages.describe(shells["LLaVA-1.5 with 0.5B 336"])["visual_tokens"] == 576
    assert ttft_stages.describe(shells["ConvNeXt-L with 0.5B 1024"])["visual_tokens"] == 1024
    assert shells["FastVLM-1.5B 2048"].visual_tokens == 1280


def test_a_prompts_arithmetic_by_hand(shells: dict[str, Contender]) -> None:
    """Prefill: two operations a weight and token, and the attention's two products."""
    shell = shells["FastVLM-0.5B 512"]
    length = TEXT_BEFORE + TEXT_AFTER + 64
    config = shell.decoder.config
    width, hidden, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = width // heads
    weights = 2 * width * width + 2 * width * size * config.num_key_value_heads + 3 * width * hidden
    layer = 2 * length * weights + 4 * length * length * width
    counted = ttft_stages.describe(shell)["gflop"]
    assert counted["prefill"] == pytest.approx(24 * layer / 1e9, rel=1e-3)
    assert counted["first_token"] == pytest.approx(2 * width * config.vocab_size / 1e9, rel=1e-3)


def test_unknown_names_are_refused() -> None:
    assert ttft_stages.chosen(["onevision"]) == ["LLaVA-OneVision-0.5B 1152"]
    assert len(ttft_stages.chosen(None)) == len(Contenders("meta").all())
    with pytest.raises(InputError, match="got 'gpt'"):
        ttft_stages.chosen(["gpt"])


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the models be small ones."""
    small = {**LIVELY, "vocab_size": 50, "tie_word_embeddings": True}
    monkeypatch.setattr(ttft_models, "DECODERS", {"0.5B": small})
    encoder = {"depths": (1, 1, 1, 1, 1), "widths": (8, 16, 32, 32, 32), "image_size": 64}
    monkeypatch.setitem(VARIANTS, "fastvithd", encoder)
    monkeypatch.setattr(ttft_models, "SIZES", ((64, 1), (128, 1), (128, 2)))


NAMES = ["FastVLM-0.5B 64", "FastVLM-0.5B 128"]


@pytest.mark.usefixtures("_tiny")
def test_stages_are_told_apart() -> None:
    contender = dict(Contenders().all())[NAMES[0]]()

    def slow(x: Tensor) -> Tensor:
        time.sleep(0.05)
        return contender.features(x)

    times = ttft_stages.time_stages(replace(contender, features=slow), torch.rand(contender.pixels))
    assert len(times) == len(ttft_stages.STAGES)
    assert all(taken > 0 for taken in times)
    # It sleeps before the encoder.
    assert times[0] > 50 > times[1]


@pytest.mark.usefixtures("_tiny")
def test_our_engine_gives_transformers_first_token() -> None:
    contender = dict(Contenders().all())[NAMES[1]]()
    theirs = Contenders().in_transformers(contender.decoder)
    x = torch.randn(1, 9, 64)
    with torch.inference_mode():
        torch.testing.assert_close(contender.logits(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_tiny")
def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    ttft_stages.measure_ttft(NAMES, tmp_path, rounds=2)
    file = tmp_path / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert [json.loads(line)["name"] for line in lines] == NAMES * 2
    file.write_text("".join(lines[:3]) + lines[3][:20])
    records = ttft_stages.measure_ttft(
        NAMES, tmp_path, rounds=3, progress=lambda *seen: done.append(seen)
    )
    assert done[-1] == (6, 6)
    kept = [json.loads(line)["ms"] for line in lines[:3]]
    assert [record["rounds"] for record in records] == [3, 3]
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["ms"] for entry in whole[:3]] == kept
    with pytest.raises(InputError, match="was measured with"):
        ttft_stages.measure_ttft(NAMES, tmp_path, rounds=1, dtype=torch.bfloat16)


@pytest.mark.usefixtures("_tiny")
def test_the_report(tmp_path: Path) -> None:
    records = ttft_stages.measure_ttft(NAMES, tmp_path, rounds=1)
    heading, body = rows(records)
    assert [len(row) for row in body] == [len(heading)] * 2
    text = markdown(records, "a machine")
    assert text.count("\n| FastVLM-0.5B | fastvlm |") == 2
    assert "on a machine" in text
    plot(records, tmp_path / "ttft.png")
    with Image.open(tmp_path / "ttft.png") as image:
        assert image.size == (1200, 750)
