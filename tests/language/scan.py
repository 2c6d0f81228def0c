"""Every generating class of transformers: a tiny model of it, its decoder and its replies.

`python -m tests.language.scan table.json` prints a line for each class and writes them as JSON.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from fastvlm.language.families import text_decoder
from tests.language.tiny import BuildError, build, each, first_line

MAPPINGS = ["CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM"]
LIMIT = 12
SPEAKING = {"qwen2_5_omni", "qwen3_omni_moe"}
SECONDS, MEMORY, PROCESSES = 60, 3 << 30, 2
PARTS = ["embed_tokens", "layers", "norm", "rotary_emb"]


class GeneratingClass(NamedTuple):
    """A class of transformers that generates, and the mapping that names it."""

    model_type: str
    class_name: str
    mapping: str


@dataclass
class Row:
    """What the scan finds of a class."""

    model_type: str
    class_name: str
    mapping: str
    built: bool = False
    reason: str = ""
    parameters: int = 0
    encoder_decoder: bool = False
    decoder: dict[str, Any] = field(default_factory=dict)
    generates: bool = False
    error: str = ""
    tokens: list[int] = field(default_factory=list)
    cache: str = ""
    cache_layers: list[str] = field(default_factory=list)
    seconds: float = 0.0


class GenerateError(Exception):
    """A class that transformers itself doesn't generate with from a text prompt."""


def classes() -> list[GeneratingClass]:
    """Return every generating class of the installed transformers, from its own mappings."""
    found: dict[tuple[str, str], GeneratingClass] = {}
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, value in names.items():
            for name in each(value):
                found.setdefault((model_type, name), GeneratingClass(model_type, name, mapping))
    return list(found.values())


def tiny(model_type: str, class_name: str) -> PreTrainedModel:
    """Return a tiny model whose replies vary where they can.

    Raises:
        BuildError: The class can't be built so small, with the reason.
    """
    return build(model_type, class_name, varied)


def varied(model: PreTrainedModel) -> int:
    """Return how many different tokens a model's reply has, or 0 where it has none."""
    try:
        return len(set(expected(model, prompt(model), LIMIT)))
    except GenerateError:
        return 0


def prompt(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a text prompt: what an encoder reads, where there is one."""
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": torch.randint(30, 60, (1, 7), generator=generator),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
    }
    if model.config.model_type == "udop":  # its encoder asks where on a page the words stand
        inputs["bbox"] = torch.arange(28, dtype=model.dtype).view(1, 7, 4) / 28
    return inputs


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], limit: int) -> Any:
    """Return what transformers generates greedily.

    Raises:
        GenerateError: It doesn't.
    """
    made: Any = model
    options: dict[str, Any] = {}
    if model.config.model_type in SPEAKING:  # they would speak, and count the words apart
        options = {"generation_mode": "text", "thinker_max_new_tokens": limit}
    try:
        with torch.no_grad():
            return made.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                **options,
                return_dict_in_generate=True,
                output_logits=True,
            )
    except Exception as error:
        said = f"transformers itself doesn't generate: {first_line(error)}"
        raise GenerateError(said) from error


def expected(model: PreTrainedModel, inputs: dict[str, Tensor], limit: int) -> list[int]:
    """Return the tokens that transformers generates greedily.

    Raises:
        GenerateError: It doesn't.
    """
    return new_tokens(model, inputs, generated(model, inputs, limit))


def new_tokens(model: PreTrainedModel, inputs: dict[str, Tensor], out: Any) -> list[int]:
    """Return the tokens that `generate` added."""
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    if any(logits.isnan().any() for logits in out.logits or ()):
        raise GenerateError("The logits aren't numbers.")
    return out.sequences[0, start:].tolist()


def structure(model: PreTrainedModel) -> dict[str, Any]:
    """Return how a model's decoder is made."""
    found: dict[str, Any] = {"error": ""}
    try:
        decoder: Any = text_decoder(model)
    except Exception as error:  # noqa: BLE001  whatever it raises is what the scan is after
        found["error"] = first_line(error)
        decoder = model.base_model
    config = decoder.config
    found |= {
        "class": type(decoder).__name__,
        "model_type": config.model_type,
        "parts": {name: hasattr(decoder, name) for name in PARTS},
        "children": {name: type(part).__name__ for name, part in decoder.named_children()},
        "forward": list(inspect.signature(decoder.forward).parameters),
        "layer_types": getattr(config, "layer_types", None),
        "sliding_window": getattr(config, "sliding_window", None),
        "stacks": {
            name: {
                "class": type(part[0]).__name__,
                "number": len(part),
                "forward": list(inspect.signature(part[0].forward).parameters),
            }
            for name, part in decoder.named_modules()
            if isinstance(part, nn.ModuleList) and len(part) and "." not in name
        },
    }
    return found


def row(found: GeneratingClass) -> Row:
    """Return what a scan finds of a class."""
    began = time.monotonic()
    made = Row(*found)
    try:
        model = tiny(found.model_type, found.class_name)
    except BuildError as error:
        made.reason = str(error)
        return made
    made.built = True
    made.parameters = sum(parameter.numel() for parameter in model.parameters())
    made.encoder_decoder = bool(model.config.is_encoder_decoder)
    made.decoder = structure(model)
    try:
        inputs = prompt(model)
        out = generated(model, inputs, LIMIT)
        made.tokens = new_tokens(model, inputs, out)
        made.generates = True
        describe_cache(made, out)
    except Exception as error:  # noqa: BLE001  one class must not stop the scan
        made.error = first_line(error)
    made.seconds = round(time.monotonic() - began, 1)
    return made


def describe_cache(made: Row, out: Any) -> None:
    """Note which cache `generate` used."""
    for name in ("cache", "past_key_values", "cache_params", "mems", "state"):
        cache = getattr(out, name, None)
        if cache is not None:
            made.cache = type(cache).__name__
            inner = getattr(cache, "self_attention_cache", cache)
            made.cache_layers = [type(part).__name__ for part in getattr(inner, "layers", [])]
            return


def _child(found: GeneratingClass, end: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    end.send(row(found))


def apart(found: GeneratingClass) -> Row:
    """Return what a scan finds of a class, in a process of its own."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(found, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return ours.recv()
        return Row(*found, reason=f"It took more than {SECONDS} s.")
    except EOFError:
        process.join()
        return Row(*found, reason=f"Its process ended with status {process.exitcode}.")
    finally:
        process.kill()
        process.join()


def rows(asked: Iterable[GeneratingClass]) -> Iterator[Row]:
    """Yield what a scan finds of some classes, two at a time."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield from pool.map(apart, asked)


def unbuilt(found: Iterable[Row]) -> dict[tuple[str, str], str]:
    """Return the classes that can't be built, each with its reason."""
    return {(one.model_type, one.class_name): one.reason for one in found if not one.built}


def line(one: Row) -> str:
    """Return a row as text."""
    name = f"{one.model_type:28} {one.class_name:45}"
    if not one.built:
        return f"{name} NOT BUILT {one.reason[:160]}"
    parts = "".join("+" if there else "-" for there in one.decoder["parts"].values())
    said = f"{len(set(one.tokens))}/{len(one.tokens)}" if one.generates else one.error[:160]
    sorts = ",".join(sorted(set(one.decoder["layer_types"] or [])))
    return f"{name} {parts} {one.cache:22} {sorts:30} {said}"


def main(arguments: list[str]) -> None:
    """Print the table, and write it: `scan [table.json [model type ...]]`."""
    asked = [one for one in classes() if not arguments[1:] or one.model_type in arguments[1:]]
    found = []
    for one in rows(asked):
        found.append(one)
        sys.stdout.write(line(one) + "\n")
        sys.stdout.flush()
    built, generating = sum(one.built for one in found), sum(one.generates for one in found)
    sys.stdout.write(f"{len(found)} classes, {built} built, {generating} generate\n")
    if arguments:
        Path(arguments[0]).write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
