"""Folders of models with changed files, loaded and asked; `transformers` is the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from fastvlm import load
from fastvlm.prompts import question
from fastvlm_example.scenes import render, sample
from tests.fuzzing.area import WrongError
from tests.fuzzing.folders import Change, changed, changes
from tests.fuzzing.models import FASTVITHD, save_family, save_fastvithd

PROMPT, MAX_NEW_TOKENS = "What is it?", 5
FAMILIES = ("llama", "llava", "qwen2.5-vl", "smolvlm", "blip2-opt", "blip2-t5")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model's folder with changes."""

    model: str
    changes: tuple[Change, ...]


class LoadedModels:
    """What the areas have in common that change a model's files.

    Args:
        folder: Where the models are saved.
    """

    models: ClassVar[Sequence[str]] = (FASTVITHD, *FAMILIES)
    files: ClassVar[Sequence[str]] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = {
            name: save_fastvithd(folder) if name == FASTVITHD else save_family(name, folder / name)
            for name in self.models
        }
        self.image = render(sample(3), 64)

    def cases(self) -> st.SearchStrategy[Any]:
        """See `Area`."""
        return st.sampled_from(list(self.models)).flatmap(
            lambda model: st.builds(Loaded, st.just(model), changes(self.names(model)))
        )

    def names(self, model: str) -> list[str]:
        """Return the files that are changed of those that a model has."""
        return [name for name in self.files if (self.saved[model] / name).is_file()]

    def check(self, case: Loaded) -> None:
        """See `Area`."""
        place = changed(self.saved[case.model], self.folder / "changed", case.changes)
        torch.manual_seed(1)
        vlm = load(place)
        image = self.image if vlm.prompts.shows_images else None
        reply = vlm.generate(PROMPT, image, max_new_tokens=MAX_NEW_TOKENS)
        torch.manual_seed(2)
        expected = replied(place, vlm.prompts.inputs(question(PROMPT, image)))
        if expected is not None and expected[: len(reply.token_ids)] != list(reply.token_ids):
            raise WrongError(f"{reply.token_ids}, and transformers' {expected}")


def replied(folder: Path, inputs: Any) -> list[int] | None:
    """Return the reply of the model as `transformers` loads it; None if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder)
            shows = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            auto = AutoModelForImageTextToText if shows else AutoModelForCausalLM
            model = auto.from_pretrained(folder, dtype=torch.float32).eval()
            out = model.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True
            )
            encodes = model.config.get_text_config(decoder=True).is_encoder_decoder
            start = 1 if encodes else inputs["input_ids"].shape[1]
            return out[0, start:].tolist()
    except Exception:  # noqa: BLE001 (what it doesn't load, it can't say anything about)
        return None
