"""Shards in WebDataset's layout: tar files whose consecutive members of one name are a record."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from fastvlm.data.conversations import Broken, BrokenRecordError, Conversation, Record, converted
from fastvlm.data.extras import needed
from fastvlm.data.image_folders import ImageFolders
from fastvlm.data.questions import IMAGE_SUFFIXES
from fastvlm.data.turns import conversation_of, is_known
from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.text_files import parse_json

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Suffixes of shards."""


class _WholeHeaders(tarfile.TarInfo):
    """Headers of a tar file that ends where its end is marked.

    Python's own take any header that they can't read, and a file that stops between two members,
    for the end: the rest of a cut shard would be lost without a word.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """Return the next member.

        Raises:
            ReadError: There is none, and no mark of the end.
            HeaderError: The end.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"it stops without an end ({first_line(error)})") from error


Members = list[tuple[str, bytes]]
"""Each member's name after its first dot, in lower case, and its contents."""


@dataclass(frozen=True, slots=True)
class TarShards:
    """Tar files, local or at any URL that fsspec supports (`hf://`, `s3://`, `https://`), streamed.

    A record's members are its images, and a `.json` with a row of a supported format or a `.txt`
    with a caption.

    Args:
        files: Paths or URLs.
    """

    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, shard: int, start: int) -> Iterator[Record]:
        """Yield a shard's records from number `start` on.

        The records after a damaged place in a shard are lost, and count as one broken record.

        Raises:
            InputError: The shard can't be opened, or can't be reached any more.
        """
        file = self.files[shard]
        for key, members in read_members(file, start):
            if isinstance(members, Broken):
                yield members
            else:
                yield converted(f"{key} of {PurePosixPath(file).name}", members, _conversation)


def read_members(file: str, start: int = 0) -> Iterator[tuple[str, Members | Broken]]:
    """Yield each record's key and members, from record number `start` of a shard on.

    What follows a damaged place is lost, and counts as one broken record.

    Args:
        file: The shard's path or URL.
        start: The number of the first record; the members before are not read.

    Raises:
        InputError: The shard can't be opened, or can't be reached any more.
    """
    try:
        with (
            needed("fsspec").open(file, "rb") as data,
            tarfile.open(fileobj=data, mode="r|*", tarinfo=_WholeHeaders) as tar,
        ):
            yield from _samples(tar, start)
    except tarfile.TarError as error:
        yield file, Broken(file, f"damaged shard: {first_line(error)}")
    except (OSError, ImportError) as error:
        raise InputError(f"The shard {file} can't be read: {first_line(error)}.") from error


def _samples(tar: tarfile.TarFile, start: int) -> Iterator[tuple[str, Members]]:
    """Yield the records from number `start` on; the members before are not read."""
    key, members, number = "", Members(), -1
    for info in tar:
        path = PurePosixPath(info.name)
        name, _, ending = path.name.partition(".")
        if not name or not info.isfile():
            continue
        if str(path.parent / name) != key:
            if number >= start:
                yield key, members
            key, members, number = str(path.parent / name), [], number + 1
        if number >= start and (held := tar.extractfile(info)) is not None:
            members.append((ending.lower(), held.read()))
    if number >= start:
        yield key, members


def is_image(ending: str) -> bool:
    """Return whether a member with this ending is an image."""
    return "." + ending.rpartition(".")[2] in IMAGE_SUFFIXES


def images_of(members: Members) -> list[bytes]:
    """Return the images among a record's members."""
    return [data for ending, data in members if is_image(ending)]


def _conversation(name: str, members: Members) -> Conversation:
    images = images_of(members)
    held = dict(members)
    row = {}
    try:
        # What img2dataset writes besides an image and its caption is a json about the download.
        if "json" in held and is_known(found := parse_json(held["json"])):
            row = found
        elif "txt" in held:
            row = {"caption": held["txt"].decode()}
    except ValueError as error:
        raise BrokenRecordError(f"malformed turn: {first_line(error)}") from error
    # Its images are the members, whatever the row calls them.
    apart = {key: value for key, value in row.items() if key not in ("image", "images")}
    return conversation_of(name, {**apart, "images": images}, ImageFolders([]))


def find_shards(pattern: str) -> TarShards:
    """Return the shards that match a pattern.

    Args:
        pattern: A path or URL, with `*` for any name, `{0000..0123}` for numbers and `{a,b}` for
            alternatives.

    Raises:
        InputError: A shard is missing, or there is none.
    """
    files = [file for one in expand_braces(pattern) for file in _matches(one)]
    if not files:
        raise InputError(f"There is no shard at {pattern}.")
    return TarShards(tuple(dict.fromkeys(files)))


def _matches(pattern: str) -> list[str]:
    if "://" in pattern:
        if "*" not in pattern:
            return [pattern]
        try:
            system, path = needed("fsspec").core.url_to_fs(pattern)
            return sorted(system.unstrip_protocol(found) for found in system.glob(path))
        except (OSError, ImportError, ValueError) as error:
            raise InputError(f"{pattern} can't be listed: {first_line(error)}.") from error
    if Path(pattern).is_file():
        return [pattern]
    anchor = Path(pattern).anchor
    found = sorted(map(str, Path(anchor).glob(pattern[len(anchor) :])))
    if not found:
        raise InputError(f"There is no shard at {pattern}.")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with braces expands to, in a shell's order."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    first, last, names = found.groups()
    if names is None:
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(last) >= int(first) else -1
        choices = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    else:
        choices = names.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [f"{before}{one}{rest}" for one in choices for rest in expand_braces(after)]
