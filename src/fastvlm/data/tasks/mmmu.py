"""MMMU: questions of 30 college subjects, multiple choice or open (Yue et al. 2023)."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastvlm.data.tasks.task import CHOICE_PROMPT, SHORT_ANSWER_PROMPT, Item, check_replies
from fastvlm.functional.errors import InputError
from fastvlm.functional.text_files import reads
from fastvlm.metrics.multidiscipline import DISCIPLINES, OPTION_LETTERS, Key, discipline_scores

PARQUET_COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
MULTIPLE_CHOICE_TYPE = "multiple-choice"


@dataclass(frozen=True, slots=True)
class Mmmu:
    """MMMU's questions.

    Attributes:
        items: The questions; an id names its subject.
        keys: The right answers, by item.
        name: The benchmark's name in a table.
    """

    items: Sequence[Item]
    keys: Mapping[str, Key]
    name: str = "MMMU"
    judged: ClassVar[bool] = False

    def score(self, replies: Mapping[str, str]) -> dict[str, float]:
        """Return the share of right replies, `overall` and by discipline, 0 to 1.

        Raises:
            InputError: An item has no reply, or a reply no item.
        """
        check_replies(self.items, replies)
        # In the items' order, in which an option is drawn for replies that name none.
        return discipline_scores({item.id: replies[item.id] for item in self.items}, self.keys)


@reads("MMMU's files")
def mmmu(folder: Path) -> Mmmu:
    """Read MMMU's 900 validation questions, with their images in memory.

    Args:
        folder: Holds a folder for each subject with its `validation-*.parquet`, as on the Hugging
            Face Hub. Reading them needs pyarrow (the extra `data`).

    Raises:
        InputError: A subject's file or pyarrow is missing.
    """
    subjects = [subject for subjects in DISCIPLINES.values() for subject in subjects]
    files = {
        subject: sorted(folder.glob(f"{subject}/validation-*.parquet")) for subject in subjects
    }
    missing = [subject for subject, found in files.items() if not found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(subjects)} subjects have no validation-*.parquet in {folder}:"
            f" {missing[0]}, ..."
        )
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "MMMU's files are read by pyarrow: pip install 'fastvlm[data]'."
        ) from error
    return mmmu_questions(
        row
        for subject in sorted(subjects)
        for file in files[subject]
        for row in parquet.read_table(file, columns=list(PARQUET_COLUMNS)).to_pylist()
    )


def mmmu_questions(rows: Iterable[Mapping[str, Any]]) -> Mmmu:
    """Make the task of MMMU's rows, with the prompts of MMMU's authors for LLaVA-1.5.

    The model sees a question's first image only; references to others in the text stay.

    Args:
        rows: Rows with the columns of the published files: `options` a Python list as text,
            `image_1` the file's `bytes`.
    """
    items = []
    keys = {}
    for row in rows:
        question = row["question"]
        options: tuple[str, ...] | None = None
        if row["question_type"] == MULTIPLE_CHOICE_TYPE:
            options = tuple(ast.literal_eval(row["options"]))
            listed = "".join(
                f"({letter}) {option}\n"
                for letter, option in zip(OPTION_LETTERS, options, strict=False)
            )
            prompt = f"{question}\n{listed}\n{CHOICE_PROMPT}"
        else:
            prompt = f"{question}\n{SHORT_ANSWER_PROMPT}"
        items.append(Item(row["id"], prompt, row["image_1"]["bytes"]))
        keys[row["id"]] = Key(_answers(row["answer"]), options)
    return Mmmu(tuple(items), keys)


def _answers(written: str) -> tuple[str, ...]:
    """The right answers: one, or where several are right a list as Python writes it."""
    several = written.startswith("['") and written.endswith("']")
    return tuple(ast.literal_eval(written)) if several else (written,)
