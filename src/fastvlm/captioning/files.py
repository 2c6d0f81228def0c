"""What captions are written to: a file for each part, whole or not there."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvlm.data.conversations import Broken
from fastvlm.data.extras import needed
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import storage_errors, write_json, write_text, written_file
from fastvlm.functional.text_files import read_json

Format = Literal["jsonl", "parquet"]
PLAN_FILE_NAME = "plan.json"
FAILED_FILE_NAME = "failed.jsonl"
LISTING_FILE_NAME = "images.jsonl"
CAPTION_COLUMNS = ("image", "prompt", "text", "finish_reason", "tokens")


@dataclass(frozen=True, slots=True)
class PartFiles:
    """The files of a run in its folder.

    A part is finished when its file is there; that is written beside and renamed, after the file of
    its failures.

    Args:
        folder: The folder.
        format: JSON lines or parquet.
        copied: Fields of the images' rows that are copied to the output.
    """

    folder: Path
    format: Format = "jsonl"
    copied: tuple[str, ...] = ()

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Record what is done here, or check that it is the same as before.

        Args:
            plan: What the output depends on, in plain types.

        Raises:
            InputError: The folder has captions of another plan.
            StorageError: The folder can't be written to.
        """
        file = self.folder / PLAN_FILE_NAME
        with storage_errors(self.folder):
            # What killed workers left.
            for left in (*self.folder.glob("*.partial"), *self.folder.glob("failed/*.partial")):
                left.unlink(missing_ok=True)
        if self.format == "parquet":
            needed("pyarrow")
        if not file.is_file():
            write_json(file, dict(plan))
            return
        known = read_json(file)
        for name, value in json.loads(json.dumps(plan)).items():
            if known.get(name) != value:
                raise InputError(
                    f"{self.folder} has captions of a run with another {name}: resume it with the"
                    " same input and options, or choose another output."
                )

    def part(self, number: int) -> Path:
        """Return a part's file."""
        return self.folder / f"part-{number:06d}.{self.format}"

    def failures(self, number: int) -> Path:
        """Return the file of a part's failures, which is there if it has any."""
        return self.folder / "failed" / f"part-{number:06d}.jsonl"

    def finished(self) -> set[int]:
        """Return the numbers of the parts that are finished."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            names = [re.fullmatch(r"part-(\d+)\." + self.format, one.name)
                     for one in self.folder.iterdir()]  # fmt: skip
        return {int(found[1]) for found in names if found is not None}

    def write(
        self, number: int, rows: Sequence[Mapping[str, Any]], failed: Sequence[Broken]
    ) -> None:
        """Write a part.

        Args:
            number: The part's number.
            rows: The captions, in the images' order.
            failed: The images without one, and why.

        Raises:
            StorageError: The disk is full, or the files can't be written.
        """
        # A worker that was given up for dead may still write the part that another does again.
        tag = f".{uuid.uuid4().hex}"
        if failed:
            write_text(self.failures(number), "".join(map(_failure_line, failed)), tag)
        with written_file(self.part(number), tag) as beside:
            if self.format == "parquet":
                self._write_parquet(beside, rows)
            else:
                lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                beside.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    def _write_parquet(self, file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        arrow = needed("pyarrow")
        columns = {name: arrow.string() for name in (*CAPTION_COLUMNS, *self.copied)}
        columns["tokens"] = arrow.int32()
        # One schema for all parts: a field that is no text is copied as JSON.
        texts = [{name: _cell(row.get(name), name) for name in columns} for row in rows]
        table = arrow.Table.from_pylist(texts, schema=arrow.schema(columns))
        needed("pyarrow.parquet").write_table(table, file)

    def collect_failures(self, parts: int) -> int:
        """Write the failures of all parts into one file, in order, and return their number.

        Args:
            parts: The number of parts, all of which are finished.

        Raises:
            StorageError: The file can't be written.
        """
        count = 0
        with written_file(self.folder / FAILED_FILE_NAME) as beside, beside.open("wb") as whole:
            for number in range(parts):
                if self.failures(number).is_file():
                    content = self.failures(number).read_bytes()
                    whole.write(content)
                    count += content.count(b"\n")
        return count


def _failure_line(failed: Broken) -> str:
    row = {"image": failed.name, "reason": failed.reason}
    return json.dumps(row).encode("ascii", "backslashreplace").decode() + "\n"


def _cell(value: Any, name: str) -> Any:
    if value is None or isinstance(value, str) or name == "tokens":
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
