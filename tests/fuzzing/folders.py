"""A folder of files, one or two of them changed: what models and drafts are loaded from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzzing.mutations import Edit, JsonEdit, dumped, edited, edited_json, edits, json_edits

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
WHOLE = {
    "pointer": POINTER,
    "empty": b"",
    "page": b"<!DOCTYPE html><html><body>404</body></html>",
    "list": b"[]",
    "object": b"{}",
    "zeros": b"\0" * 300,
}
"""What may lie in a file's place."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a file.

    Args:
        file: Its name.
        to: What becomes of it as a whole (`missing`, `folder`, a key of `WHOLE`); None where it is
            edited.
        json: Changes of the JSON in it.
        bytes: Changes of its bytes.
    """

    file: str
    to: str | None
    json: tuple[JsonEdit, ...]
    bytes: tuple[Edit, ...]


def changes(files: Sequence[str]) -> st.SearchStrategy[tuple[Change, ...]]:
    """Draw changes of one file or two."""
    name = st.sampled_from(list(files))
    whole = st.builds(
        Change,
        name,
        st.sampled_from(["missing", "folder", *WHOLE]),
        st.just(()),
        st.just(()),
    )
    parsed = st.builds(Change, name, st.none(), json_edits(), st.just(()))
    raw = st.builds(Change, name, st.none(), st.just(()), edits(3))
    one = st.one_of(parsed, parsed, parsed, raw, raw, whole)
    return st.lists(one, min_size=1, max_size=2).map(tuple)


def changed(source: Path, place: Path, made: Sequence[Change]) -> Path:
    """Return a fresh copy of a folder, with changes."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    for change in made:
        file = place / change.file
        if not file.is_file():
            continue
        if change.to == "missing":
            file.unlink()
        elif change.to == "folder":
            file.unlink()
            file.mkdir()
        elif change.to is not None:
            file.write_bytes(WHOLE[change.to])
        else:
            _edit(file, change)
    return place


def _edit(file: Path, change: Change) -> None:
    content = file.read_bytes()
    if change.json and file.suffix == ".json":
        try:
            content = dumped(edited_json(json.loads(content), change.json))
        except (ValueError, RecursionError):
            return
    elif change.json and file.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        try:
            header = json.loads(content[8 : 8 + size])
        except ValueError:
            return
        written = dumped(edited_json(header, change.json))
        content = len(written).to_bytes(8, "little") + written + content[8 + size :]
    file.write_bytes(edited(content, change.bytes))
