"""Requests in many words, of which some are kept from all training; descriptions that vary."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fastvlm.cli.questions import DESCRIPTION_PROMPT
from fastvlm.data.conversations import Conversation
from fastvlm.data.reading import read_conversations
from fastvlm.data.tasks.task import CAPTION_PROMPT
from fastvlm.training.replies import text_of
from fastvlm_example.scenes import describe, sample
from prompts import of_descriptions
from recipe import conversations, wordings
from recipe.conversations import about_photo, about_scene
from recipe.descriptions import described_by, nearly_repeated, sentences_of, shared
from recipe.questions import write_questions
from recipe.wordings import CANONICAL, HELD_OUT, all_forms, wording

CAPTIONS = (
    "A brown dog runs over the grass.",
    "The dog is running on grass.",
    "An animal with a red ball in its mouth.",
    "A brown dog ran over grass fast.",
    "Trees stand behind a fence.",
)


def test_requests_are_many_and_none_is_held_out() -> None:
    random.seed(1)
    for kind in CANONICAL:
        drawn = [wording(kind) for _ in range(4000)]
        held_out = {text.lower().rstrip(".!?") for text in HELD_OUT[kind]}
        assert not {text.lower().rstrip(".!?") for text in drawn} & held_out
        assert len({*drawn}) > 400
        assert 0.2 < drawn.count(CANONICAL[kind]) / len(drawn) < 0.3
        assert not [text for text in drawn if "{" in text or "  " in text]


def test_a_held_out_request_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    [held_out, *_] = HELD_OUT["sentence"]
    drawn = iter([held_out, held_out.lower(), held_out[:-1], "Say it."])
    monkeypatch.setattr(wordings, "CANONICAL_SHARE", 0.0)
    monkeypatch.setattr(wordings, "varied", lambda _: next(drawn))
    assert wording("sentence") == "Say it."


def test_what_commands_ask_by_default_is_held_out() -> None:
    assert CAPTION_PROMPT in HELD_OUT["sentence"]
    assert DESCRIPTION_PROMPT in HELD_OUT["description"]
    assert sum(map(len, HELD_OUT.values())) >= 12
    assert not {*all_forms()} & {text for texts in HELD_OUT.values() for text in texts}


def test_a_description_says_different_things() -> None:
    random.seed(2)
    for _ in range(20):
        said = sentences_of(described_by(CAPTIONS))
        assert said[0] in CAPTIONS[:3]
        assert len(said) == 3
        assert {"An animal with a red ball in its mouth.", "Trees stand behind a fence."} < {*said}
        assert not nearly_repeated(said)
    assert described_by(["A dog runs."] * 5) == "A dog runs."


def test_sentences_are_alike_by_the_words_that_tell_something() -> None:
    assert shared("A dog is running.", "Two dogs run on the grass.") == 1.0
    assert shared("A dog is running.", "A dog with a ball.") == 0.5
    assert shared("A dog is running.", "The man is in the house.") == 0.0
    assert nearly_repeated(["A man sits.", "A dog.", "The man is sitting on a bench."])
    assert not nearly_repeated(["A man sits.", "A dog.", "The man is sleeping."])


def test_a_photo_has_a_description_only_if_there_is_more_to_say() -> None:
    random.seed(3)
    assert {said.kind for said in about_photo(CAPTIONS)} == {"description", "sentence"}
    alike = about_photo(["A dog runs.", "The dog runs.", "Dogs are running."])
    assert [said.kind for said in alike] == ["sentence", "sentence"]


def test_a_scene_answers_to_every_kind_of_request(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(4)
    monkeypatch.setattr(conversations, "wording", lambda kind: kind)
    scene = sample(7)
    replies: dict[str, set[str]] = {}
    for _ in range(100):
        said = about_scene(scene, 0.0)
        replies.setdefault(said.prompt, set()).add(said.reply)
    whole = describe(scene)
    assert replies == {
        "scene": {whole},
        "description": {whole},
        "sentence": {sentences_of(whole)[0]},
    }


def test_questions_for_a_draft_are_read_as_conversations(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "images").mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(3)]
    for name in names:
        Image.new("RGB", (40, 40)).save(photos / "images" / name)
    (photos / "train.txt").write_text("\n".join(names))
    lines = [f"{name}\t{caption}" for name in names for caption in CAPTIONS]
    (photos / "captions.tsv").write_text("\n".join(lines))
    output = tmp_path / "questions"
    write_questions(photos, output, number=7, scenes=2, size=64)
    rows = read_conversations(output)
    found = [row for row in rows if isinstance(row, Conversation)]  # type: ignore[union-attr]
    assert len(found) == 9
    shown = [row.messages[0]["content"][0]["image"] for row in found]
    # Each photo before one comes again.
    assert sorted(Path(image).name for image in shown[:3]) == names
    assert [Path(image).name for image in shown[7:]] == ["0.png", "1.png"]
    asked = [text_of(row.messages[0]) for row in found]
    assert asked == [text.strip() for text in asked]
    assert not {*asked} & {text for texts in HELD_OUT.values() for text in texts}
    before = json.loads((output / "conversations.json").read_text())
    write_questions(photos, output, number=7, scenes=2, size=64)
    assert json.loads((output / "conversations.json").read_text()) == before


def test_repeated_sentences_are_counted() -> None:
    texts = ["A dog. A cat.", "A dog. A cat. A dog.", "A man sits. The man is sitting."]
    vlm: Any = SimpleNamespace(
        generate_batch=lambda *_, **__: [SimpleNamespace(text=text) for text in texts]
    )
    found = of_descriptions(vlm, ["a", "b", "c"])
    assert (found["descriptions"], found["repeat a sentence"], found["nearly repeat one"]) == (
        3,
        1,
        2,
    )
