"""What workers and replicas load in tests: small models, and parts that end their worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvlm.data.conversations import Broken
from fastvlm.data.image_records import ImageRecord
from fastvlm.decoding import Strategy
from fastvlm.functional.errors import InputError
from fastvlm.serving.app import Server
from fastvlm.serving.settings import ServerSettings
from fastvlm.vlm import VisionLanguageModel
from fastvlm_example.scenes import render, sample
from tests.models import small_vlm


def load_model() -> VisionLanguageModel:
    """Return a small model."""
    torch.set_num_threads(1)
    return small_vlm(torch.float32, max_slots=4)


def usual(vlm: VisionLanguageModel) -> Strategy:
    """Return a model's usual strategy."""
    return vlm.strategy()


def load_server() -> Server:
    """Return a server of a small model."""
    return Server(load_model(), "small", ServerSettings())


@dataclass(frozen=True)
class Scenes:
    """A part of rendered scenes.

    Args:
        numbers: The scenes; a negative number is a broken record.
        deadly: A file: where it is missing, it is made, and the process ends before the last scene.
        unreadable: Whether the part can't be read.
    """

    numbers: tuple[int, ...]
    deadly: Path | None = None
    unreadable: bool = False

    @property
    def count(self) -> int:
        """The number of records."""
        return len(self.numbers)

    def read(self) -> Iterator[ImageRecord | Broken]:
        """Yield the scenes."""
        if self.unreadable:
            raise InputError("The part can't be read.")
        for number in self.numbers:
            if self.deadly is not None and number == self.numbers[-1] and not self.deadly.exists():
                self.deadly.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number < 0:
                yield Broken(f"{number}", "it is broken")
            else:
                yield ImageRecord(f"{number}", render(sample(number), 128), {})
