"""Processors are loaded from what a directory says, and none needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    Mistral3Config,
    Qwen2Config,
    Qwen2VLConfig,
)
from transformers.utils import is_torchvision_available

from fastvlm.checkpoints.processors import load_processor, processor_class
from fastvlm.functional.errors import CheckpointError
from tests.families import FAMILIES
from tests.processors import PROCESSORS, asked, sample_image


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_processor_survives_its_directory(family: str, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    processor = PROCESSORS[family]()
    config = FAMILIES[family]()[0].config
    processor.save_pretrained(tmp_path / "first")
    once = load_processor(tmp_path / "first", config)
    once.save_pretrained(tmp_path / "second")
    again = load_processor(tmp_path / "second", config)
    expected = asked(processor, ["What?"] * 2, [sample_image(0), sample_image(1)])
    for other in (once, again):
        assert type(other).__name__ == type(processor).__name__
        found = asked(other, ["What?"] * 2, [sample_image(0), sample_image(1)])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_directory_with_a_video_processor(tmp_path: Path) -> None:
    """As they are on the hub, in the older and in the newer layout."""
    processor = PROCESSORS["qwen2-vl"]()
    processor.save_pretrained(tmp_path)
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2}
    file = tmp_path / "processor_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "video_processor": video}))
    expected = asked(processor, ["What?"], [sample_image(0)])
    found = asked(load_processor(tmp_path, Qwen2VLConfig()), ["What?"], [sample_image(0)])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    file.unlink()
    older = {**stored["image_processor"], "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    found = asked(load_processor(tmp_path, Qwen2VLConfig()), ["What?"], [sample_image(0)])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_decides_before_the_family(tmp_path: Path) -> None:
    assert processor_class(tmp_path, LlavaConfig()) is LlavaProcessor
    (tmp_path / "tokenizer_config.json").write_text('{"processor_class": "LlavaNextProcessor"}')
    assert processor_class(tmp_path, LlavaConfig()) is LlavaNextProcessor
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    assert processor_class(tmp_path, LlavaConfig()) is LlavaProcessor


def test_a_processor_that_needs_a_package_says_which(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(CheckpointError) as caught:
        load_processor(tmp_path, Mistral3Config())
    said = str(caught.value)
    assert said.startswith("The processor PixtralProcessor needs torchvision: install torchvision")
    assert said.endswith(".")


def test_nothing_says_which(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the family 'qwen2' has none of its own"):
        processor_class(tmp_path, Qwen2Config())
