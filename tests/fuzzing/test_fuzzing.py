"""Fuzzing: 5,000 cases, and the ones that once went wrong.

`python -m tests.fuzzing.fuzz --cases 50000` runs more of them, and prints the counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzzing import sandbox
from tests.fuzzing.areas import AREAS
from tests.fuzzing.areas.configurations import Configurations
from tests.fuzzing.areas.datasets import DataSets, Read
from tests.fuzzing.areas.drafts import Drafts
from tests.fuzzing.areas.images import Array, File, Given, Images
from tests.fuzzing.areas.loaded import Loaded
from tests.fuzzing.areas.tokenizers import Tokenizers
from tests.fuzzing.folders import Change
from tests.fuzzing.fuzz import quiet, tallied
from tests.fuzzing.mutations import Edit, JsonEdit

CASES, SEED = 5000, 16


def edit(file: str, *changes: JsonEdit | Edit) -> Change:
    """Return a change of a file."""
    return Change(
        file,
        None,
        tuple(one for one in changes if isinstance(one, JsonEdit)),
        tuple(one for one in changes if isinstance(one, Edit)),
    )


QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
FOUND: list[tuple[type[Any], Any]] = [
    (Images, File("palette.png", (), "path")),
    (Images, File("deep.png", (), "bytes")),
    (Images, Array((), "object", "huge", tensor=False)),
    (Images, Array((), "bool", "signed", tensor=True)),
    (Images, Given({"url": 1})),
    (Configurations, Loaded("llama", (edit("config.json", JsonEdit("replace", 384, [])),))),
    (Configurations, Loaded("llama", (edit("generation_config.json", JsonEdit("wrap", 2516, 0)),))),
    (Configurations, Loaded("smolvlm", (Change("config.json", "list", (), ()),))),
    (Tokenizers, Loaded("llama", (Change("tokenizer.json", "missing", (), ()),
                                  Change("tokenizer_config.json", "missing", (), ())))),
    (Tokenizers, Loaded("fastvithd", (edit("chat_template.jinja", Edit("cut", 767170, 0, b"5")),))),
    (Drafts, (edit("config.json", JsonEdit("wrap", 182, True), JsonEdit("wrap", 5, {})),)),
    (Drafts, (edit("config.json", JsonEdit("delete", 223, {}), JsonEdit("rename", 22, []),
                   JsonEdit("rename", 1239, [])),)),
    (DataSets, Read("vqa", (edit(ANNOTATIONS, JsonEdit("replace", 1, False)),))),
    (DataSets, Read("vqa", (edit(ANNOTATIONS, JsonEdit("replace", 0, None)),))),
    (DataSets, Read("coco captions",
                    (edit("captions_train2017.json", JsonEdit("replace", 2314, [193, 23])),))),
    (DataSets, Read("karpathy", (edit("dataset_coco.json", JsonEdit("swap", 1084, [])),))),
    (DataSets, Read("textvqa",
                    (edit("TextVQA_0.5.1_val.json", JsonEdit("replace", 213, ["", 252])),))),
    (DataSets, Read("docvqa", (edit("val_v1.0.json", JsonEdit("swap", 179, {})),))),
    (DataSets, Read("docvqa", (edit("val_v1.0.json", Edit("cut", 427, 13, b"[" * 2000)),))),
    (DataSets, Read("pope", (edit("coco/coco_pope_random.json", Edit("write", 0, 1, b"\xf7")),))),
    (DataSets, Read("flickr", (edit("captions.tsv", Edit("write", 4648, 13, b"\xbc")),))),
    (DataSets, Read("packed captions",
                    (edit("captions.json.gz", Edit("flip", 759, 20, b"1e999999")),))),
]  # fmt: skip
"""What fuzzing has found, cut to what matters: an area, and a case of it."""


@pytest.fixture(scope="module")
def areas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the areas that have been made, by name."""
    return {"folder": tmp_path_factory.mktemp("fuzzing")}


@pytest.mark.parametrize(
    ("kind", "case"), FOUND, ids=[f"{kind.name}-{number}" for number, (kind, _) in enumerate(FOUND)]
)
def test_what_was_found_stays_mended(kind: type[Any], case: Any, areas: dict[str, Any]) -> None:
    quiet()
    if kind.name not in areas:
        folder: Path = areas["folder"] / kind.name
        folder.mkdir()
        areas[kind.name] = kind(folder)
    outcome = sandbox.run(areas[kind.name].check, case)
    assert outcome.fine, outcome.said


@pytest.mark.slow
@pytest.mark.parametrize("name", AREAS)
def test_whatever_is_given_is_right_or_one_sentence(name: str) -> None:
    quiet()
    tally = tallied(name, round(CASES * AREAS[name].share), SEED)
    assert not tally.faults, tally.faults[0]
