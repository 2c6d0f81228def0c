"""Rows as publishers write them become turns as chat templates take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm.data.conversations import BrokenRecordError
from fastvlm.data.image_folders import ImageFolders
from fastvlm.data.turns import CAPTION_PROMPT, SHORT_ANSWER_PROMPT, conversation_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    return tmp_path


def turns(row: Any, folder: Path) -> list[tuple[str, list[Any]]]:
    """Return roles with texts and images' names."""
    found = conversation_of("it", row, ImageFolders([folder]))
    assert found.name == "it"
    return [
        (
            message["role"],
            [
                part["text"] if part["type"] == "text" else Path(part["image"]).name
                for part in message["content"]
            ],
        )
        for message in found.messages
    ]


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


def test_llavas_conversation(folder: Path) -> None:
    row = {
        "id": "000000033471",
        "image": "a.jpg",
        "conversations": said(
            ("human", "<image>\nWhat are the colors of the bus?"),
            ("gpt", "The bus is white and red."),
            ("human", "What feature can be seen on its back?"),
            ("gpt", "An advertisement."),
        ),
    }
    assert turns(row, folder) == [
        ("user", ["a.jpg", "What are the colors of the bus?"]),
        ("assistant", ["The bus is white and red."]),
        ("user", ["What feature can be seen on its back?"]),
        ("assistant", ["An advertisement."]),
    ]


def test_the_only_image_of_a_turn_comes_first_and_several_stay(folder: Path) -> None:
    one = {
        "image": "a.jpg",
        "conversations": said(("human", "Who?\n<image>"), ("gpt", "A man.")),
    }
    assert turns(one, folder)[0] == ("user", ["a.jpg", "Who?"])
    two = {
        "image": ["a.jpg", "b.png"],
        "conversations": said(("human", "First <image> then <image> which?"), ("gpt", "Both.")),
    }
    assert turns(two, folder)[0] == ("user", ["First", "a.jpg", "then", "b.png", "which?"])


def test_a_conversation_without_a_image_is_cut_to_what_can_be_learnt(folder: Path) -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            *said(("gpt", "cut off"), ("human", "Hi"), ("gpt", "Hello"), ("human", "And?")),
        ]
    }
    assert turns(row, folder) == [
        ("system", ["Be brief."]),
        ("user", ["Hi"]),
        ("assistant", ["Hello"]),
    ]


def test_messages_as_chat_templates_take_them(folder: Path) -> None:
    # Arrow gives every part every key.
    row = {
        "images": ["b.png"],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None, "image": None},
                    {"type": "text", "text": "What?", "image": None},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cup.", "image": None}]},
        ],
    }
    assert turns(row, folder) == [("user", ["b.png", "What?"]), ("assistant", ["A cup."])]
    own = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.jpg"}]},
            {"role": "assistant", "content": "A dog."},
        ]
    }
    assert turns(own, folder) == [("user", ["a.jpg"]), ("assistant", ["A dog."])]


def test_images_that_no_turn_places_come_first(folder: Path) -> None:
    row = {
        "images": ["a.jpg", "b.png"],
        "messages": [
            {"role": "user", "content": "Compare them."},
            {"role": "assistant", "content": "Alike."},
        ],
    }
    assert turns(row, folder)[0] == ("user", ["a.jpg", "b.png", "Compare them."])


@pytest.mark.parametrize(
    "said", [{"caption": " A cat. "}, {"text": "A cat."}, {"captions": ["A cat.", "It sits."]}]
)
def test_a_caption_answers_a_prompt(said: dict[str, Any], folder: Path) -> None:
    assert turns({"image": "a.jpg", **said}, folder) == [
        ("user", ["a.jpg", CAPTION_PROMPT]),
        ("assistant", ["A cat."]),
    ]


def test_a_prompt_is_kept_as_it_is(folder: Path) -> None:
    assert turns({"prompt": "def f(x):\n    "}, folder) == [("user", ["def f(x):\n    "])]
    row = {"prompt": "1 + 1 =", "completion": " 2\n"}
    assert turns(row, folder) == [("user", ["1 + 1 ="]), ("assistant", [" 2\n"])]


def test_the_most_frequent_answer_is_learnt(folder: Path) -> None:
    answers = [{"answer": text, "answer_id": 1} for text in ("tea", "no", "lunch", "lunch", "")]
    row = {"image": "a.jpg", "question": "What is it?", "answers": answers}
    expected = [
        ("user", ["a.jpg", f"What is it?\n{SHORT_ANSWER_PROMPT}"]),
        ("assistant", ["lunch"]),
    ]
    assert turns(row, folder) == expected
    assert turns({**row, "answers": ["no", "lunch", "lunch"]}, folder) == expected
    one = {"image": "a.jpg", "question": "What is it?", "answer": "Lunch, on a tray."}
    assert turns(one, folder) == [
        ("user", ["a.jpg", "What is it?"]),
        ("assistant", ["Lunch, on a tray."]),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg"}, "none of messages, conversations"),
        ("a text", "none of messages"),
        ({"image": "c.jpg", "caption": "A cat."}, r"missing image: c\.jpg"),
        ({"caption": "A cat."}, "missing image: there is a caption and no image"),
        ({"image": 7, "caption": "A cat."}, "missing image: 7"),
        ({"image": b"GIF89a", "caption": "A cat."}, "unreadable image"),
        ({"image": "x" * 5000, "caption": "A cat."}, "missing image"),
        ({"image": "a\0.jpg", "caption": "A cat."}, "missing image"),
        ({"image": "a.jpg", "caption": "  "}, "no reply"),
        ({"prompt": " "}, "no prompt"),
        ({"prompt": "What?", "completion": ""}, "no reply"),
        ({"prompt": "What?", "image": "a.jpg"}, "an image"),
        ({"image": "a.jpg", "captions": []}, "no reply"),
        ({"image": "a.jpg", "question": "Why?"}, "no reply"),
        ({"image": "a.jpg", "question": "Why?", "answers": []}, "no reply"),
        ({"conversations": "Hi"}, "malformed turn: conversations is no list"),
        ({"conversations": []}, "no reply"),
        ({"conversations": ["Hi"]}, "malformed turn: 'Hi'"),
        ({"conversations": said(("human", "Hi"))}, "no reply"),
        ({"conversations": said(("human", "Hi"), ("gpt", " "))}, "no reply: turn 2"),
        ({"conversations": said(("human", "Hi"), ("tool", "4"))}, "its role is 'tool'"),
        (
            {"conversations": said(("human", "Hi"), ("human", "Hi"), ("gpt", "Yes"))},
            "turn 2 is again the user's",
        ),
        (
            {"image": "a.jpg", "conversations": said(("human", "Hi"), ("gpt", "<image>"))},
            "an image in the assistant's",
        ),
        (
            {"image": "a.jpg", "conversations": said(("human", "<image><image>"), ("gpt", "Yes"))},
            "missing image: places for 2, and 1 given",
        ),
        (
            {
                "image": ["a.jpg", "b.png"],
                "conversations": said(("human", "<image>"), ("gpt", "Yes")),
            },
            "malformed turn: places for 1, and 2 given",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "video", "video": "a"}]},
                    {"role": "assistant", "content": "Yes"},
                ]
            },
            "malformed turn: .*video",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "neither text nor parts"),
    ],
)
def test_a_broken_row_says_what_is_wrong(row: Any, reason: str, folder: Path) -> None:
    with pytest.raises(BrokenRecordError, match=reason):
        conversation_of("it", row, ImageFolders([folder]))


def test_an_images_further_captions_are_alternatives(folder: Path) -> None:
    def alternatives(**row: Any) -> tuple[str, ...]:
        return conversation_of("it", {"image": "a.jpg", **row}, ImageFolders([folder])).alternatives

    assert alternatives(captions=["A cat.", " It sits. ", "A pet."]) == ("It sits.", "A pet.")
    assert alternatives(caption="A cat.") == alternatives(captions=["A cat."]) == ()
    with pytest.raises(BrokenRecordError, match="no reply"):
        alternatives(captions=["A cat.", " "])
