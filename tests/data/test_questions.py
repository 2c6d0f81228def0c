"""Questions and their images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from fastvlm.data.questions import Prompt, Question, images_in, read_prompts
from fastvlm.functional.errors import InputError
from fastvlm.vision.loading import load_image
from fastvlm_example import HELD_OUT_SCENES, SCENE_PROMPT
from fastvlm_example.scenes import render, sample


@pytest.mark.parametrize("seed", [4, HELD_OUT_SCENES, 0])
def test_a_scenes_question_shows_the_scene(seed: int) -> None:
    image = Question(SCENE_PROMPT, seed).open(128)
    assert isinstance(image, Image.Image)
    assert image.size == (128, 128)
    assert image.tobytes() == render(sample(seed), 128).tobytes()


def test_a_photos_question_shows_the_photo(tmp_path: Path) -> None:
    path = tmp_path / "b.jpg"
    Image.new("RGB", (5, 4), (255, 0, 0)).save(path, quality=100)
    asked = Question("Why?", str(path))
    assert asked.open(64) == path
    assert load_image(asked.open(64)).size == (5, 4)


def test_a_folders_images_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("c.JPG", "a.png", "b.jpeg", "notes.txt", "d", ".jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.png").write_bytes(b"")
    assert [path.name for path in images_in(tmp_path)] == ["a.png", "b.jpeg", "c.JPG"]
    assert [path.name for path in images_in(tmp_path, 2)] == ["a.png", "b.jpeg"]
    assert len(images_in(tmp_path, 9)) == 3


def test_a_folder_in_a_folder_of_images_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b.png").write_bytes(b"")
    assert [path.name for path in images_in(tmp_path)] == ["b.png"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no folder of images at {tmp_path}/none"):
        images_in(tmp_path / "none")
    with pytest.raises(InputError, match=f"no image in {tmp_path}"):
        images_in(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(InputError, match="no folder of images"):
        images_in(tmp_path / "file.png")


def test_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"kind": "code", "prompt": "def f(x):\\n    "}\n\n{"prompt": "Why? "}\n')
    assert read_prompts(file) == [Prompt("def f(x):\n    ", "code"), Prompt("Why? ")]


@pytest.mark.parametrize("text", ["", "\n", "Why?", "[]", '{"prompt": 3}', '{"prompt": " "}'])
def test_what_is_no_prompt_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(file))):
        read_prompts(file)
