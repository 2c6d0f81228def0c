"""What a model can't be asked gets one clear sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import fastvlm
from fastvlm.functional.errors import InputError
from fastvlm.prompts import question
from fastvlm.vlm import VisionLanguageModel
from tests.processors import character_tokenizer, saved
from tests.processors import sample_image as image


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in ("llava", "qwen2-vl", "blip2-opt"):
        found[family] = tmp_path_factory.mktemp(family)
        saved(family, found[family])
    return found


def load(folder: Path) -> VisionLanguageModel:
    return fastvlm.load(folder, dtype=torch.float64)


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in parts
        ],
    }


@pytest.mark.parametrize(
    ("family", "given", "told"),
    [
        ("llava", ("<image> What?", image(0)), "must not contain the image's placeholder"),
        ("llava", ("<image> What?",), "must not contain the image's placeholder"),
        ("qwen2-vl", ("<|video_pad|> What?",), "must not contain the image's placeholder"),
        ("llava", ("What?", "no/such.png"), "There is no image at no/such.png"),
        ("llava", ([{"role": "user", "content": [{"type": "video"}]}],), "A part of a message is"),
        ("llava", ([turn("user", "What?")], image(0)), "leave out the image"),
        ("blip2-opt", ("What?",), "takes one image with each prompt; got 0"),
        ("blip2-opt", ([turn("user", image(0), image(1), "?")],), "one image .* got 2"),
        (
            "blip2-opt",
            ([turn("user", image(0), "?"), turn("assistant", "a"), turn("user", "b")],),
            "Blip2ForConditionalGeneration has no chat template .* got 3 turns",
        ),
        ("blip2-opt", ("<image>?", image(0)), "must not contain the image's placeholder"),
    ],
)
def test_a_dialogue_that_can_not_be(
    family: str, given: tuple[Any, ...], told: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=told):
        load(folders[family]).generate(*given)


def test_a_template_that_refuses(folders: dict[str, Path]) -> None:
    vlm = load(folders["llava"])
    vlm.prompts.processor.chat_template = "{{ raise_exception('Two turns at most') }}"
    with pytest.raises(InputError, match=r"template of Llava.* refuses the dialogue: Two turns"):
        vlm.generate("What?", image(0))


def test_a_processor_that_lacks_a_setting(folders: dict[str, Path]) -> None:
    vlm = load(folders["llava"])
    vlm.prompts.processor.patch_size = None
    with pytest.raises(InputError, match=r"processor of Llava.* refuses the prompt: unsupported"):
        vlm.generate("What?", image(0))


@pytest.mark.parametrize(
    "options", [{"image_size": 64}, {"fit": "crop"}, {"fit": "crop", "tiles": 2}]
)
def test_options_of_another_encoder(options: dict[str, Any], folders: dict[str, Path]) -> None:
    vlm = load(folders["llava"])
    messages = question("What?", image(0))
    refused = f"decides how an image is shown; leave out {', '.join(options)}"
    for ask in (vlm.prompts.inputs, vlm.prompts.decoder_inputs):
        with pytest.raises(InputError, match=refused):
            ask(messages, **options)
    with pytest.raises(InputError, match=refused):
        vlm.generate("What?", image(0), **options)


def test_a_processor_without_its_template(tmp_path: Path) -> None:
    saved("llava", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"processor of LlavaFor.* has no chat template"):
        load(tmp_path)


def test_an_unknown_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=97))
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    # No weight is read for that.
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    with pytest.raises(InputError, match="mamba"):
        load(tmp_path)
