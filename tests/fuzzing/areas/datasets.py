"""Data sets in every layout, and published benchmarks, with changed files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fastvlm.data.conversations import Broken, Records
from fastvlm.data.reading import read_conversations
from fastvlm.data.tasks import LOADERS
from fastvlm.functional.errors import InputError
from fastvlm.prompts.messages import images_of
from fastvlm.vision.loading import load_image
from fastvlm_example.scenes import render, sample
from tests.fuzzing.area import WrongError
from tests.fuzzing.folders import Change, changed, changes

TURNS = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A bus."},
]


@dataclass(frozen=True, slots=True)
class Read:
    """A data set's folder with changes.

    Args:
        layout: Which.
        changes: Those of its files.
    """

    layout: str
    changes: tuple[Change, ...]


class DataSets:
    """See `Area`."""

    name: ClassVar[str] = "data sets"
    share: ClassVar[float] = 0.18

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layouts = {name: make(folder / name) for name, make in LAYOUTS.items()}

    def cases(self) -> st.SearchStrategy[Any]:
        """See `Area`."""
        return st.sampled_from(sorted(self.layouts)).flatmap(
            lambda layout: st.builds(
                Read, st.just(layout), changes(self.layouts[layout]) | st.just(())
            )
        )

    def check(self, case: Read) -> None:
        """See `Area`."""
        place = changed(self.folder / case.layout, self.folder / "changed", case.changes)
        if case.layout in LOADERS:
            read_task(case.layout, place)
        else:
            found = read_all(place)
            if not case.changes and not found:
                raise WrongError("nothing is read of a whole data set")


def read_task(name: str, folder: Path) -> None:
    """Read a benchmark, open what it shows, and score replies."""
    task = LOADERS[name](folder)
    for item in task.items:
        load_image(item.open())
    if not task.judged and not task.items[0].options:
        task.score({item.id: "yes" for item in task.items})


def read_all(source: Path) -> int:
    """Read each record and show its images; return how many are whole."""
    records = read_conversations(source)
    if isinstance(records, Records):
        found = list(records)
    else:
        found = [one for shard in range(len(records)) for one in records.read(shard, 0)]
    whole = 0
    for record in found:
        if isinstance(record, Broken):
            continue
        for image in images_of(record.messages):
            try:
                load_image(image)
            except InputError:
                continue
        whole += 1
    return whole


def _draw(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        render(sample(1), 64).resize((8, 6)).save(file)


def _json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content).encode()
    file.write_bytes(gzip.compress(text, mtime=0) if file.suffix == ".gz" else text)


def _llava(folder: Path) -> list[str]:
    _draw(folder / "images" / "a.jpg")
    rows = [{"id": str(n), "image": "a.jpg", "conversations": TURNS} for n in range(3)]
    _json(folder / "llava.json", rows)
    return ["llava.json", "images/a.jpg"]


def _lines(folder: Path) -> list[str]:
    _draw(folder / "images" / "a.jpg")
    row = {"id": "1", "image": "a.jpg", "conversations": TURNS}
    (folder / "llava.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    return ["llava.jsonl"]


def _coco(folder: Path) -> list[str]:
    _draw(folder / "train2017" / "9.jpg")
    images = [{"id": 9, "file_name": "9.jpg"}]
    captions = [{"id": n, "image_id": 9, "caption": "A dish."} for n in range(2)]
    _json(folder / "captions_train2017.json", {"images": images, "annotations": captions})
    return ["captions_train2017.json"]


def _packed_captions(folder: Path) -> list[str]:
    _draw(folder / "a.jpg")
    _json(folder / "captions.json.gz", {"a.jpg": ["One.", "Two."]})
    return ["captions.json.gz"]


def _vqa(folder: Path) -> list[str]:
    _draw(folder / "train2014" / "COCO_train2014_000000000007.jpg")
    names = (
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_mscoco_train2014_annotations.json",
    )
    questions = [{"image_id": 7, "question": "Who?", "question_id": 70}]
    answers = [{"answer": "me", "answer_id": n} for n in range(10)]
    annotations = [{"image_id": 7, "question_id": 70, "answers": answers,
                    "multiple_choice_answer": "me"}]  # fmt: skip
    _json(folder / names[0], {"questions": questions})
    _json(folder / names[1], {"annotations": annotations})
    return [*names]


def _karpathy(folder: Path) -> list[str]:
    _draw(folder / "val2014" / "a.jpg")
    image = {"filepath": "val2014", "filename": "a.jpg", "split": "train",
             "sentences": [{"raw": "A dog.", "tokens": []}]}  # fmt: skip
    _json(folder / "dataset_coco.json", {"images": [image], "dataset": "coco"})
    return ["dataset_coco.json"]


def _flickr(folder: Path) -> list[str]:
    _draw(folder / "images" / "a.jpg")
    (folder / "captions.tsv").write_text("a.jpg\tA dog runs .\na.jpg\tIt runs\n")
    (folder / "train.txt").write_text("a.jpg\n")
    (folder / "dev.txt").write_text("")
    return ["captions.tsv", "train.txt"]


def _table(folder: Path) -> list[str]:
    _draw(folder / "a.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["a.png", "A, cat"]])
    return ["metadata.csv"]


def _beside(folder: Path) -> list[str]:
    _draw(folder / "a.jpg")
    (folder / "a.txt").write_text("A cat.\n")
    return ["a.txt", "a.jpg"]


def _tar(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    image = io.BytesIO()
    render(sample(1), 64).resize((8, 6)).save(image, "JPEG")
    with tarfile.open(folder / "part-0.tar", "w") as tar:
        for number in range(2):
            for ending, data in (("jpg", image.getvalue()), ("txt", b"A dog.")):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return ["part-0.tar"]


def _pope(folder: Path) -> list[str]:
    _draw(folder / "val2014" / "a.jpg")
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
    for sampling in ("random", "popular", "adversarial"):
        place = folder / "coco" / f"coco_pope_{sampling}.json"
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(row) + "\n")
    return ["coco/coco_pope_random.json", "coco/coco_pope_popular.json"]


def _textvqa(folder: Path) -> list[str]:
    _draw(folder / "train_images" / "003a.jpg")
    row = {"question_id": 1, "image_id": "003a", "question": "what?", "answers": ["a"] * 10}
    _json(folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    return ["TextVQA_0.5.1_val.json"]


def _docvqa(folder: Path) -> list[str]:
    _draw(folder / "documents" / "p_1.png")
    row = {"questionId": 5, "question": "Who?", "image": "documents/p_1.png", "answers": ["A"]}
    _json(folder / "val_v1.0.json", {"data": [row]})
    return ["val_v1.0.json"]


LAYOUTS: dict[str, Callable[[Path], list[str]]] = {
    "llava": _llava,
    "lines": _lines,
    "coco captions": _coco,
    "packed captions": _packed_captions,
    "vqa": _vqa,
    "karpathy": _karpathy,
    "flickr": _flickr,
    "table": _table,
    "beside": _beside,
    "tar": _tar,
    "pope": _pope,
    "textvqa": _textvqa,
    "docvqa": _docvqa,
}
