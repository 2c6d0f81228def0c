"""Captions of parts: the model's own replies, in order, whatever fails and whenever it stops."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm.captioning.files import PartFiles
from fastvlm.captioning.loop import PartResult, Question, caption_parts
from fastvlm.captioning.template import PromptTemplate
from fastvlm.data.conversations import Broken
from fastvlm.data.image_records import ImageRecord
from fastvlm.decoding.structured import StructuredOutput
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.models import small_vlm

LIMIT = 12


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return small_vlm(max_slots=3)


@dataclass(frozen=True)
class Scenes:
    """A part of rendered scenes; negative numbers are broken records."""

    numbers: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.numbers)

    def read(self) -> Iterator[ImageRecord | Broken]:
        for number in self.numbers:
            if number < 0:
                yield Broken(f"{number}", "it is broken")
            else:
                yield ImageRecord(
                    f"{number}", render(sample(number), 128), {"topic": f"no. {number}"}
                )


PARTS = [Scenes((0, 1, -1, 2)), Scenes((-2,)), Scenes(()), Scenes((3, 4)), Scenes((5, 6, 7, 8, 9))]


def run(
    vlm: VisionLanguageModel,
    files: PartFiles,
    template: str = "Describe {topic}",
    copied: tuple[str, ...] = (),
    **options: Any,
) -> list[PartResult]:
    asked = Question(PromptTemplate(template), {"max_new_tokens": LIMIT, **options}, copied)
    done = files.finished()
    todo = [pair for pair in enumerate(PARTS) if pair[0] not in done]
    return list(caption_parts(vlm, todo, asked, files, image_threads=2))


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_captions_are_the_models_own_in_order(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    results = run(vlm, PartFiles(tmp_path), copied=("topic",))
    assert sorted((one.number, one.images, len(one.failed)) for one in results) == [
        (0, 4, 1), (1, 1, 1), (2, 0, 0), (3, 2, 0), (4, 5, 0)
    ]  # fmt: skip
    for number, part in enumerate(PARTS):
        rows = lines(tmp_path / f"part-{number:06}.jsonl")
        assert [row["image"] for row in rows] == [str(one) for one in part.numbers if one >= 0]
        for row in rows:
            prompt = f"Describe no. {row['image']}"
            image = render(sample(int(row["image"])), 128)
            reply = vlm.generate(prompt, image, max_new_tokens=LIMIT)
            assert row == {
                "image": row["image"],
                "prompt": prompt,
                "topic": f"no. {row['image']}",
                "text": reply.text.strip(),
                "finish_reason": reply.finish_reason,
                "tokens": len(reply.token_ids),
            }
    assert PartFiles(tmp_path).collect_failures(len(PARTS)) == 2
    assert lines(tmp_path / "failed.jsonl") == [
        {"image": "-1", "reason": "it is broken"}, {"image": "-2", "reason": "it is broken"}
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
def test_a_run_that_stops_goes_on_from_what_is_finished(
    vlm: VisionLanguageModel, tmp_path: Path, options: Mapping[str, Any]
) -> None:
    run(vlm, PartFiles(tmp_path / "whole"), **options)
    stopped = PartFiles(tmp_path / "stopped")
    asked = Question(PromptTemplate("Describe {topic}"), {"max_new_tokens": LIMIT, **options})
    steps = caption_parts(vlm, enumerate(PARTS), asked, stopped)
    first = next(steps)
    steps.close()
    assert stopped.finished() == {first.number}
    assert not vlm.engine.slots
    results = run(vlm, stopped, **options)
    assert first.number not in {one.number for one in results}
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_sampled_replies_depend_on_their_place_alone(
    vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    run(vlm, PartFiles(tmp_path / "a"), temperature=2.0, seed=1)
    run(vlm, PartFiles(tmp_path / "b"), temperature=2.0, seed=2)
    assert content(tmp_path / "a") != content(tmp_path / "b")
    file = tmp_path / "a" / "part-000003.jsonl"
    before = file.read_bytes()
    file.unlink()
    run(vlm, PartFiles(tmp_path / "a"), temperature=2.0, seed=1)
    assert file.read_bytes() == before


def test_parquet_has_the_same_rows(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `data` is not installed")
    run(vlm, PartFiles(tmp_path / "lines"), copied=("topic",))
    run(vlm, PartFiles(tmp_path / "tables", "parquet", ("topic",)), copied=("topic",))
    for number in range(len(PARTS)):
        name = f"part-{number:06}"
        rows = parquet.read_table(tmp_path / "tables" / f"{name}.parquet").to_pylist()
        assert rows == lines(tmp_path / "lines" / f"{name}.jsonl")


def test_replies_of_a_form(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"],
              "additionalProperties": False}  # fmt: skip
    run(vlm, PartFiles(tmp_path), structured=StructuredOutput("json", schema), max_new_tokens=40)
    rows = lines(tmp_path / "part-000004.jsonl")
    assert len(rows) == 5
    assert all(set(json.loads(row["text"])) == {"red"} for row in rows)


def test_an_image_whose_request_fails_is_a_failure(
    vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = vlm.prompts.encoded

    def failing(prepared: Any, *rest: Any) -> Any:
        if any(vlm.tokenizer.decode(tokens).count("no. 4") for tokens, _ in prepared):
            raise ValueError("this image is odd")
        return encoded(prepared, *rest)

    monkeypatch.setattr(vlm.prompts, "encoded", failing)
    results = {one.number: one for one in run(vlm, PartFiles(tmp_path))}
    assert results[3].failed == (Broken("4", "ValueError: this image is odd"),)
    assert [row["image"] for row in lines(tmp_path / "part-000003.jsonl")] == ["3"]
    run_again = run(vlm, PartFiles(tmp_path), "{colour}")
    assert not run_again, "all parts are finished"


def test_a_row_without_the_field_is_a_failure(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    results = run(vlm, PartFiles(tmp_path), "{colour}")
    assert sum(len(one.failed) for one in results) == sum(one.images for one in results) == 12


def test_want_of_memory_ends_the_run(
    vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(vlm.prompts, "encoded", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run(vlm, PartFiles(tmp_path))
    assert PartFiles(tmp_path).finished() <= {1, 2}


def test_another_plan_is_refused(tmp_path: Path) -> None:
    files = PartFiles(tmp_path)
    files.begin({"input": "a", "question": {"stop": ("x",)}})
    files.begin({"input": "a", "question": {"stop": ("x",)}})
    with pytest.raises(InputError, match="question"):
        files.begin({"input": "a", "question": {"stop": ("y",)}})
