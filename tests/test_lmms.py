"""The adapter for lmms-eval, with stand-ins for the classes of lmms-eval that it touches."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import fastvlm.lmms
from fastvlm.evaluation.likelihood import likelihoods
from fastvlm.functional.errors import InputError
from fastvlm_example.scenes import render, sample
from tests.models import small_vlm


class Base:
    """lmms-eval's base class, as far as its models use it."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.partial: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: self.partial.append(args))


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("fastvlm.lmms.model", None)


@pytest.fixture
def model(modules: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    del modules
    loaded = importlib.import_module("fastvlm.lmms.model")
    vlm = small_vlm()
    monkeypatch.setattr(loaded, "load", lambda *_, **__: vlm)
    made = loaded.FastVlm("DIR", batch_size="1")
    scenes = [{"image": render(sample(n), 128), "answer": "red"} for n in range(2)]
    made.task_dict = {"scenes": {"test": scenes}}
    return made


def instance(context: str, second: Any, document: int) -> SimpleNamespace:
    visual = lambda content: [content["image"]]  # noqa: E731 (a task hands over a function)
    return SimpleNamespace(args=(context, second, visual, document, "scenes", "test"))


@pytest.mark.usefixtures("modules")
def test_the_manifest_names_a_class_that_is_there() -> None:
    manifest = fastvlm.lmms.manifest()
    assert manifest.model_id == "fastvlm"
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), Base)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["lmms_eval.models"] == {
        "fastvlm": "fastvlm.lmms:manifest"
    }


def test_replies_are_ours(model: Any) -> None:
    requests = [
        instance("<image>\nWhat is it?", {"max_new_tokens": 9, "until": ["\n\n"]}, 1),
        instance("Describe it.", {"max_new_tokens": 5, "temperature": 0, "until": "e"}, 0),
    ]
    scenes = model.task_dict["scenes"]["test"]
    expected = [
        model.vlm.generate("What is it?", scenes[1]["image"], max_new_tokens=9, stop=["\n\n"]),
        model.vlm.generate("Describe it.", scenes[0]["image"], max_new_tokens=5, stop=["e"]),
    ]
    texts = [reply.text.strip() for reply in expected]
    assert model.generate_until(requests) == texts
    # Those that finish first are kept first.
    assert sorted(kept[2] for kept in model.partial) == sorted(texts)
    assert {kept[1][0] for kept in model.partial} == {one.args[0] for one in requests}


def test_a_batch_shares_the_engine(model: Any) -> None:
    requests = [instance("What is it?", {"max_new_tokens": 4 + n}, n % 2) for n in range(7)]
    alone = [model.generate_until([request])[0] for request in requests]
    together: list[int] = []
    step = model.vlm.engine.step

    def noted(*args: Any, **options: Any) -> Any:
        gained = step(*args, **options)
        together.append(len(gained))
        return gained

    model.vlm.engine.step = noted
    assert model.generate_until(requests) == alone
    assert max(together) == 7


def test_likelihoods_of_targets(model: Any) -> None:
    image = model.task_dict["scenes"]["test"][0]["image"]
    request = model.vlm.request("What is it?", image)
    [red, blue] = likelihoods(model.vlm, request, ["red", "a large blue circle"])
    found = model.loglikelihood(
        [
            instance("What is it?", lambda content: content["answer"], 0),
            instance("What is it?", "a large blue circle", 0),
        ]
    )
    # The mean loss, as lmms-eval's own models return it: its tasks choose the smallest.
    lengths = [
        len(model.vlm.tokenizer.encode(text, add_special_tokens=False))
        for text in ("red", "a large blue circle")
    ]
    assert found == [
        (pytest.approx(-red.text / lengths[0]), red.greedy),
        (pytest.approx(-blue.text / lengths[1]), blue.greedy),
    ]


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="shown images; got str"):
        model.messages("?", ["film.mp4"])
    with pytest.raises(InputError, match="num_beams=4"):
        model.generate_until([instance("?", {"num_beams": 4}, 0)])
    with pytest.raises(InputError, match="tasks of one round"):
        model.generate_until_multi_round([1])
    assert isinstance(model.messages("x", [Image.new("RGB", (4, 4))])[0]["content"], list)
