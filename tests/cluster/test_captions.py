"""Captions by workers: the bytes of a single process, whoever does them and whoever dies."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm.captioning.files import PartFiles
from fastvlm.captioning.loop import CaptionJob, NumberedPart, Question
from fastvlm.captioning.template import PromptTemplate
from fastvlm.cluster.captions import caption_on_ray
from fastvlm.data.image_sources import find_images
from fastvlm.functional.errors import CheckpointError, InputError
from tests.cluster.making import Scenes, load_model, usual


def job(folder: Path) -> CaptionJob:
    asked = Question(PromptTemplate("Describe {name}"), {"max_new_tokens": 12})
    return CaptionJob(load_model, usual, asked, PartFiles(folder))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def parts(deadly: Path | None = None) -> list[NumberedPart]:
    found = [Scenes((0, 1, -1)), Scenes((2, 3, 4, 5, 6), deadly), Scenes((-2,)), Scenes((7, 8)),
             Scenes((9, 10, 11))]  # fmt: skip
    return list(enumerate(found))


def test_workers_write_what_one_process_writes(ray: Any, tmp_path: Path) -> None:
    assert ray.is_initialized()
    alone = sorted(job(tmp_path / "one").run(parts()), key=lambda one: one.number)
    made = caption_on_ray(job(tmp_path / "two"), parts(tmp_path / "died"), 2, None, "cpu")
    assert sorted(made, key=lambda one: one.number) == alone
    assert (tmp_path / "died").exists(), "a worker has died"
    partial = [name for name in content(tmp_path / "two") if name.endswith(".partial")]
    assert not partial
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_the_error_of_a_worker_is_told(ray: Any, tmp_path: Path) -> None:
    assert ray.is_initialized()
    broken = [(0, Scenes((1,))), (1, Scenes((2,), unreadable=True))]
    with pytest.raises(InputError, match=r"^The part can't be read\.$"):
        list(caption_on_ray(job(tmp_path), broken, 1, None, "cpu"))


def failing() -> Any:
    raise CheckpointError("There is no such model.")


def test_a_model_that_can_not_be_loaded(ray: Any, tmp_path: Path) -> None:
    assert ray.is_initialized()
    broken = replace(job(tmp_path), load=failing)
    with pytest.raises(CheckpointError, match=r"^There is no such model\.$"):
        list(caption_on_ray(broken, parts(), 1, None, "cpu"))


def test_no_cluster() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from fastvlm.cluster.connection import connected

    with (
        pytest.raises(InputError, match=r"There is no Ray cluster at 127\.0\.0\.1:1"),
        connected("127.0.0.1:1"),
    ):
        pass


def resident_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_the_memory_of_the_driver_is_flat(ray: Any, tmp_path: Path) -> None:
    assert ray.is_initialized()
    # Images that are missing cost workers nothing, and the driver what others cost it.
    file = tmp_path / "list.txt"
    file.write_text(
        "".join(f"a/long/folder/of/images/{number:08}.jpg\n" for number in range(100_000))
    )
    source = find_images(str(file), tmp_path / "listing", 64)
    images, known = 0, dict[int, int]()
    made = caption_on_ray(job(tmp_path / "out"), list(enumerate(source.parts)), 2, None, "cpu")
    for result in made:
        images += result.images
        known[images // 10_000] = resident_bytes()
    assert images == 100_000
    assert known[10] - known[2] < 24 * 2**20, known
