"""Files that are whole or not there: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastvlm.functional.errors import InputError, StorageError, first_line

FOREIGN_WRITE_ERRORS = re.compile(r"inline_container|iostream error|\(os error \d+\)|file write")
"""Messages of torch's and safetensors' errors of writing, which are no `OSError`."""
MIN_FREE_BYTES = 2**20
"""A disk with less free space than this counts as full."""


@contextmanager
def written_file(path: Path, tag: str = "") -> Iterator[Path]:
    """Yield the path to write a file to; afterwards the file is in its place, complete and flushed.

    If the process is killed or an error is raised, what was there before stays. The target of a
    symbolic link is replaced, not the link. A device or a pipe is written to directly.

    Args:
        path: The file; its folder is made if it isn't there.
        tag: Tells what is written from what others write who may write the same file: a part of
            the name that it has until then.

    Raises:
        StorageError: The disk is full, or the file can't be written there.
    """
    with storage_errors(path):
        if path.is_symlink():
            path = path.resolve()
        special = path.exists() and not path.is_file() and not path.is_dir()
    if special:
        with storage_errors(path):
            yield path
        return
    beside = path.with_name(f"{path.name}{tag}.partial")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            _flush(beside)
            beside.replace(path)
            _flush(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink()


def write_text(path: Path, text: str, tag: str = "") -> None:
    """Write a text whole or not at all. See `written_file`."""
    with written_file(path, tag) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all. See `written_file` and `as_json`."""
    write_text(path, as_json(content))


def as_json(figures: dict[str, Any]) -> str:
    """Return figures as JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def written_into(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty directory to fill; afterwards its files are moved into a folder.

    The file that marks the folder as complete is moved in last, and removed first.

    Args:
        folder: The folder; it is made if it isn't there.
        last: The name of the file that marks the folder as complete.

    Raises:
        StorageError: The disk is full, or the files can't be written there.
    """
    beside = folder / ".partial"
    try:
        with storage_errors(folder):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            files = sorted(beside.iterdir(), key=lambda file: file.name == last)
            for file in files:
                _flush(file)
            (folder / last).unlink(missing_ok=True)
            for file in files:
                file.replace(folder / file.name)
            _flush(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def written_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; afterwards it is in its place, complete and flushed.

    If the process is killed or an error is raised, what was there before stays, or nothing is
    there.

    Args:
        path: The directory. An existing one is replaced.

    Raises:
        StorageError: The disk is full, or the directory can't be written there.
    """
    beside = path.with_name(f"{path.name}.partial")
    old = path.with_name(f"{path.name}.old")
    try:
        with storage_errors(path):
            # What a killed process left.
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            for file in sorted(beside.rglob("*")):
                _flush(file)
            _flush(beside)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            try:
                beside.rename(path)
            except OSError:
                old.rename(path)
                raise
            _flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing to a disk into a `StorageError`.

    Args:
        path: What is being written.

    Raises:
        StorageError: A disk was full, or something could not be written.
    """
    try:
        yield
    except Exception as error:
        foreign = FOREIGN_WRITE_ERRORS.search(str(error))
        if not isinstance(error, OSError) and not foreign:
            raise
        raise StorageError(f"{path} can't be written: {_reason(path, error)}.") from error


def _reason(path: Path, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or _is_full(path):
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return first_line(error)


def _is_full(path: Path) -> bool:
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    return folder is not None and shutil.disk_usage(folder).free < MIN_FREE_BYTES


def _flush(path: Path) -> None:
    # Without this, a power cut may leave a renamed file without its content.
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks can't flush a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the process, however it ends.

    Args:
        folder: The folder, which is made if it isn't there.

    Raises:
        InputError: Another process holds the lock.
        StorageError: The folder can't be made or written to.
    """
    lock = FileLock(folder / ".lock")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError(
                f"Another run writes to {folder}; wait for it, or choose another output."
            ) from error
    try:
        yield
    finally:
        lock.release()
