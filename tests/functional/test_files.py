"""Files are whole or not there, whatever happens while they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvlm.functional.errors import InputError, StorageError
from fastvlm.functional.files import locked, storage_errors, written_directory, written_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half(file: Path, failure: type[BaseException]) -> None:
    file.write_text("half")
    raise failure


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.txt"
    for text in ("one", "two"):
        with written_file(file) as beside:
            beside.write_text(text)
        assert file.read_text() == text
        assert names(file.parent) == ["b.txt"]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("before")
    link.symlink_to(file)
    with written_file(link) as beside:
        beside.write_text("after")
    assert link.is_symlink()
    assert file.read_text() == "after"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with written_file(pipe) as beside:
        beside.write_text("through it")
    assert os.read(reader, 99) == b"through it"
    os.close(reader)
    assert pipe.is_fifo()
    assert names(tmp_path) == ["file", "link", "pipe"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")
    folder.mkdir()
    (folder / "inside").write_text("before")
    with pytest.raises(failure), written_file(file) as beside:
        half(beside, failure)
    with pytest.raises(failure), written_directory(folder) as beside:
        half(beside / "inside", failure)
    assert file.read_text() == (folder / "inside").read_text() == "before"
    assert names(tmp_path) == ["file", "folder"]


def test_a_directory_replaces_another_and_what_a_kill_left(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for left in ("folder", "folder.partial", "folder.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "old").touch()
    with written_directory(folder) as beside:
        (beside / "new").touch()
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_named_whoever_writes(tmp_path: Path) -> None:
    full = Path("/dev/full")
    weights = {"a": torch.zeros(100_000)}
    writers = [
        lambda: full.write_text("text" * 10_000),
        lambda: torch.save(weights, full),
        lambda: save_file(weights, tmp_path / "missing" / "file"),
    ]
    for write in writers:
        with pytest.raises(StorageError), storage_errors(tmp_path / "file"):
            write()


def test_errors_of_other_kinds_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another matter"), storage_errors(tmp_path):
        raise RuntimeError("another matter")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError), written_file(tmp_path / "file" / "inside") as beside:
        beside.touch()


def test_a_folder_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    holding = (
        "import sys, pathlib; from fastvlm.functional.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holding, os.fspath(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):
        pass
