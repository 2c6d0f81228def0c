"""Benchmarks as tasks: what each asks of a model, in LLaVA-1.5's words, and how it is scored.

Each loader reads the files that the data set's own publishers put out, from a folder with their
names in it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvlm.data.tasks.coco import coco
from fastvlm.data.tasks.docvqa import docvqa
from fastvlm.data.tasks.flickr8k import flickr8k
from fastvlm.data.tasks.llava_wild import llava_wild
from fastvlm.data.tasks.mmmu import mmmu
from fastvlm.data.tasks.mmvet import mmvet
from fastvlm.data.tasks.nocaps import nocaps
from fastvlm.data.tasks.pope import pope
from fastvlm.data.tasks.task import EvaluationTask, Item, checked
from fastvlm.data.tasks.textvqa import textvqa
from fastvlm.data.tasks.visdial import visdial
from fastvlm.data.tasks.vqav2 import vqav2

LOADERS: Mapping[str, Callable[[Path], EvaluationTask[Any]]] = {
    loader.__name__: checked(loader)
    for loader in (
        coco,
        nocaps,
        flickr8k,
        visdial,
        vqav2,
        textvqa,
        docvqa,
        mmmu,
        pope,
        mmvet,
        llava_wild,
    )
}
"""By name: a folder in, its task out."""

__all__ = [
    "LOADERS",
    "EvaluationTask",
    "Item",
    "coco",
    "docvqa",
    "flickr8k",
    "llava_wild",
    "mmmu",
    "mmvet",
    "nocaps",
    "pope",
    "textvqa",
    "visdial",
    "vqav2",
]
