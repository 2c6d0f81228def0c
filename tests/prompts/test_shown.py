"""Messages in every client's form, odd ones refused, and never an image silently unseen."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers.image_utils import load_image as transformers_load_image

import fastvlm
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.tokenizer import learn_tokenizer
from tests.cli.conftest import tiny_model
from tests.families import FAMILIES
from tests.fuzzing.models import CORPUS
from tests.processors import PROCESSORS, saved
from tests.processors import sample_image as image

TEXT = {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionLanguageModel]:
    """Return a model of each way in which prompts are made."""
    folder = tmp_path_factory.mktemp("models")
    saved("llava", folder / "llava")
    tokenizer = learn_tokenizer(CORPUS, 320)
    return {
        "llava": fastvlm.load(folder / "llava", dtype=torch.float64),
        "fastvithd": VisionLanguageModel(tiny_model(tokenizer, 6), tokenizer),
    }


def png(shown: Image.Image) -> bytes:
    file = BytesIO()
    shown.save(file, "PNG")
    return file.getvalue()


def url(shown: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(shown)).decode()


FORMS: dict[str, Callable[[Image.Image], dict[str, Any]]] = {
    "image": lambda one: {"type": "image", "image": one},
    "array": lambda one: {"type": "image", "image": np.asarray(one)},
    "url": lambda one: {"type": "image", "url": url(one)},
    "base64": lambda one: {"type": "image", "base64": base64.b64encode(png(one)).decode()},
    "image_url": lambda one: {"type": "image_url", "image_url": {"url": url(one)}},
    "image_url as text": lambda one: {"type": "image_url", "image_url": url(one)},
    "input_image": lambda one: {"type": "input_image", "image_url": url(one)},
}


@pytest.mark.parametrize("kind", ["llava", "fastvithd"])
def test_every_form_of_an_image_is_the_same_prompt(
    kind: str, models: dict[str, VisionLanguageModel]
) -> None:
    vlm, shown = models[kind], image(2)
    expected = vlm.generate("What?", shown, max_new_tokens=6).token_ids
    for form, part in FORMS.items():
        messages = [{"role": "user", "content": [part(shown), TEXT]}]
        assert vlm.generate(messages, max_new_tokens=6).token_ids == expected, form
    text = {"type": "input_text", "text": "What?"}
    messages = [{"role": "user", "content": [FORMS["image"](shown), text]}]
    assert vlm.generate(messages, max_new_tokens=6).token_ids == expected
    for given in (png(shown), BytesIO(png(shown)), np.asarray(shown), [shown]):
        assert vlm.generate("What?", given, max_new_tokens=6).token_ids == expected


def test_several_images_with_a_question(models: dict[str, VisionLanguageModel]) -> None:
    vlm, two = models["llava"], [image(1), image(2)]
    parts = [FORMS["image"](one) for one in two]
    expected = vlm.generate([{"role": "user", "content": [*parts, TEXT]}], max_new_tokens=6)
    assert vlm.generate("What?", two, max_new_tokens=6).token_ids == expected.token_ids


ODD: list[Any] = [
    7, None, {}, {"role": "user", "content": "What?"}, b"What?", [], [7], ["What?"], [None], [{}],
    [{"role": "user", "content": 7}], [{"role": 7, "content": "x"}], [{"content": "x"}],
    [{"role": "user", "content": {"type": "text"}}], [{"role": "user", "content": [None]}],
    [{"role": "user", "content": ["What?"]}], [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "image", "image": None}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "https://a.b/c.png"}]}],
    [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
    [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
    [{"role": "user", "content": "caf\udce9"}], "caf\udce9",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llava", "fastvithd"])
@pytest.mark.parametrize("prompt", ODD, ids=lambda odd: ascii(odd)[:60])
def test_odd_messages_are_refused(
    prompt: Any, kind: str, models: dict[str, VisionLanguageModel]
) -> None:
    with pytest.raises(InputError) as caught:
        models[kind].generate(prompt)
    assert "\n" not in str(caught.value)


def test_a_dark_drawing_on_nothing_is_shown_as_transformers_shows_it(
    models: dict[str, VisionLanguageModel], tmp_path: Path
) -> None:
    drawing = Image.new("RGBA", (48, 48), (255, 255, 255, 0))
    ImageDraw.Draw(drawing).ellipse((8, 8, 40, 40), fill=(20, 20, 20, 255))
    file = tmp_path / "drawing.png"
    drawing.save(file)
    vlm = models["llava"]
    own = vlm.prompts.inputs([{"role": "user", "content": [FORMS["image"](drawing), TEXT]}])
    shown = transformers_load_image(str(file))
    prompt = vlm.prompts.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, TEXT]}], add_generation_prompt=True
    )
    expected = vlm.prompts.processor(
        images=[shown], text=prompt, return_tensors="pt", add_special_tokens=False
    )
    assert own["input_ids"].equal(expected["input_ids"])
    torch.testing.assert_close(own["pixel_values"].float(), expected["pixel_values"].float())
    # Not all black.
    assert own["pixel_values"].std() > 0.1


def test_a_model_that_fails_on_its_prompt_is_refused_in_a_sentence() -> None:
    model, _ = FAMILIES["blip2-t5"]()
    model.config.image_token_id = model.config.image_token_index = None
    vlm = VisionLanguageModel(model.eval(), PROCESSORS["blip2-t5"]())
    with pytest.raises(InputError, match="Blip2ForConditionalGeneration refuses"):
        vlm.generate("What?", image(1), max_new_tokens=3)


@pytest.mark.parametrize(
    ("family", "field"), [("llava", "patch_size"), ("blip2-opt", "num_query_tokens")]
)
def test_an_image_is_never_silently_unseen(family: str, field: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    file = tmp_path / "processor_config.json"
    stored = json.loads(file.read_text())
    del stored[field]
    file.write_text(json.dumps(stored))
    vlm = fastvlm.load(tmp_path, dtype=torch.float64)
    with pytest.raises(InputError, match=field) as caught:
        vlm.generate("What?", image(0), max_new_tokens=3)
    assert "processor_config.json" in str(caught.value)
