"""Decoding beside other engines: the same weights, prompts, precision and threads, in turns.

    python benchmarks/decoding_peers.py setup [ENGINE ...]
    python benchmarks/decoding_peers.py measure --model DIR --prompts FILE [--draft DIR] --json FILE
    python benchmarks/decoding_peers.py decoder [--model DIR] FOLDER

`setup` makes a virtual environment for each engine; what is there already stays. `measure` loads
the model into a process for each engine and way of decoding, and asks them in turns for greedy
replies to text that they go on with: `transformers` eagerly, with prompt lookup, and compiled with
a static cache; vLLM, OpenVINO GenAI and llama.cpp, ordinarily and with prompt lookup; and fastvlm,
with prompt lookup and a draft. What an engine can't do is reported in its own words. Every answer
is kept at once: `--resume` goes on with a run that was ended.

Prompts are JSON lines with a `kind` and a `prompt`; they are taken kind by kind in turns, so that
`--limit` leaves as many of each. `decoder` writes a FastVLM's decoder as a Qwen2 that all engines
read, with prompts for it, and others that `fastvlm train draft --data` takes: `FOLDER/model`,
`FOLDER/prompts.jsonl` and `FOLDER/questions.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import serving_peers
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.digests import digest
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import write_json
from fastvlm.functional.text_files import read_json_lines
from fastvlm_example import HELD_OUT_SCENES
from peers.contenders import ENGINES, Contender, Worker, command_of, contenders_of
from peers.environments import ENVIRONMENTS, SetupError, make_environment
from peers.report import summary, table
from peers.rounds import Journal, Measurement, Prompt
from peers.workers.worker_protocol import PROMPT_LOOKUP_TOKENS, Order

FOLDER = Path.home() / ".cache" / "fastvlm-peers"
DTYPES = ("float32", "bfloat16", "int8", "int4")
PROMPTS, QUESTIONS = 60, 700
"""What `decoder` writes: prompts to measure with, and at most so many others for a draft."""
AS_IT_IS = """\
{%- for message in messages -%}
  {%- if message.content is string -%}
    {{ message.content }}
  {%- else -%}
    {%- for part in message.content -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endfor -%}
"""
"""A chat template that writes texts as they are."""
CONTEXT_STEP = 64
"""Contexts are a multiple of this many tokens."""


def main() -> None:
    """Set up or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="environments, converted weights and records"
    )
    verbs = parser.add_subparsers(required=True)
    setup = verbs.add_parser("setup", help="make the engines' virtual environments")
    setup.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENVIRONMENTS))
    setup.set_defaults(verb=set_up)
    measuring = verbs.add_parser("measure", help="measure, and write the figures")
    measuring.add_argument("--model", type=Path, required=True, help="in transformers' layout")
    measuring.add_argument("--draft", type=Path, help="a draft for it")
    measuring.add_argument("--prompts", type=Path, required=True, help="JSON lines")
    measuring.add_argument("--limit", type=int, help="prompts, the kinds in turns")
    measuring.add_argument("--max-new-tokens", type=int, default=128)
    measuring.add_argument("--threads", type=int, default=2)
    measuring.add_argument("--dtypes", default=",".join(DTYPES))
    measuring.add_argument("--engines", default=",".join(ENGINES))
    measuring.add_argument("--loaded", type=int, default=16, help="most models in memory")
    measuring.add_argument("--rounds", type=int, help="a round for each prompt unless given")
    measuring.add_argument("--timeout", type=float, default=1800, help="of an answer, in seconds")
    measuring.add_argument("--resume", action="store_true", help="go on with the last run")
    measuring.add_argument("--json", type=Path, required=True)
    measuring.set_defaults(verb=measure)
    decoder = verbs.add_parser(
        "decoder", help="write a FastVLM's decoder, prompts for it, and questions to teach a draft"
    )
    decoder.add_argument("--model", type=Path, help="a FastVLM; the example model unless given")
    decoder.add_argument("output", type=Path, metavar="FOLDER")
    decoder.set_defaults(verb=write_model)
    options = parser.parse_args()
    options.verb(options)


def set_up(options: argparse.Namespace) -> None:
    """Make the environments, each as far as it goes; what stops one is kept for the report."""
    unknown = set(options.engines) - set(ENVIRONMENTS)
    if unknown:
        raise InputError(
            f"The engines are {', '.join(ENVIRONMENTS)}; got {', '.join(sorted(unknown))}."
        )
    for name in options.engines or ENVIRONMENTS:
        say(f"{name}: setting up")
        error = options.folder / "environments" / f"{name}.error"
        error.unlink(missing_ok=True)
        try:
            make_environment(options.folder, name)
        except SetupError as stopped:
            error.write_text(str(stopped))
            say(str(stopped))
        else:
            say(f"{name}: ready")


def write_model(options: argparse.Namespace) -> None:
    """Write a FastVLM's decoder as a model of text, prompts for it, and others for its draft."""
    source = Path(serving_peers.MODEL) if options.model is None else options.model
    serving_peers.write_decoder(options.output / "model", source)
    # The prompts are whole conversations that a reply goes on with, so nothing is written around.
    (options.output / "model" / "chat_template.jinja").write_text(AS_IT_IS)
    prompts = [opening(HELD_OUT_SCENES + number) for number in range(PROMPTS)]
    questions = dict.fromkeys(opening(number) for number in range(QUESTIONS))
    for name, written in (
        ("prompts", [{"kind": "scene", "prompt": prompt} for prompt in prompts]),
        ("questions", [{"prompt": one} for one in questions if one not in prompts]),
    ):
        lines = "".join(json.dumps(line) + "\n" for line in written)
        (options.output / f"{name}.jsonl").write_text(lines)


def opening(scene: int) -> str:
    """Return a scene's prompt, of which two or three sentences are written."""
    return serving_peers.opening(scene, 2 + scene % 2)


def measure(options: argparse.Namespace) -> None:
    """Measure, and write the figures after each precision."""
    dtypes, engines = options.dtypes.split(","), options.engines.split(",")
    for what, given, known in (("precisions", dtypes, DTYPES), ("engines", engines, ENGINES)):
        if not set(given) <= set(known):
            raise InputError(f"The {what} are {', '.join(known)}; got {', '.join(given)}.")
    prompts = prompts_of(options)
    weights = options.folder / "weights" / digest(sorted(options.model.glob("*")))
    logs = options.folder / "logs"
    for folder in (weights, logs):
        folder.mkdir(parents=True, exist_ok=True)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    needed = longest + options.max_new_tokens + PROMPT_LOOKUP_TOKENS + 1
    plan = {
        "model": options.model.name,
        "weights": weights.name,
        "draft": None if options.draft is None else digest(sorted(options.draft.glob("*"))),
        "prompts": digest([prompt.token_ids for prompt in prompts]),
        "max_new_tokens": options.max_new_tokens,
        "threads": options.threads,
    }
    records = options.folder / "records" / f"{options.json.stem}.jsonl"
    journal = Journal(records, plan, resumes=options.resume)
    say(f"records: {records}")
    for dtype in dtypes:

        def load(contender: Contender, dtype: str = dtype) -> Worker:
            order = Order(
                str(options.model.resolve()),
                dtype,
                options.threads,
                contender.ways,
                str(weights.resolve()),
                -(-needed // CONTEXT_STEP) * CONTEXT_STEP,
                None if options.draft is None else str(options.draft.resolve()),
            )
            log = logs / f"{contender.name}-{dtype}.log"
            command = command_of(contender.engine, options.folder)
            return Worker(command, order, log, options.timeout)

        Measurement(dtype, prompts, options.max_new_tokens, journal, say).run(
            contenders_of(engines, draft=options.draft is not None),
            load,
            most=options.loaded,
            rounds=options.rounds or len(prompts),
        )
        found = {
            "hardware": {**hardware(), "threads": options.threads},
            "model": options.model.name,
            "threads": options.threads,
            "max_new_tokens": options.max_new_tokens,
            "dtypes": dtypes,
            **summary(journal, prompts),
        }
        write_json(options.json, found)
        say(table(found))


def prompts_of(options: argparse.Namespace) -> list[Prompt]:
    """Return the prompts, their kinds in turns.

    Raises:
        InputError: The file has none, or a line that is no prompt.
    """
    by_kind: dict[str, list[str]] = {}
    for line in read_json_lines(options.prompts):
        if not (isinstance(line, dict) and {"kind", "prompt"} <= line.keys()):
            raise InputError(f"A line of {options.prompts} has a kind and a prompt; got {line!r}.")
        by_kind.setdefault(line["kind"], []).append(line["prompt"])
    turns = [
        (kind, text)
        for row in zip_longest(*([(kind, text) for text in own] for kind, own in by_kind.items()))
        for kind, text in filter(None, row)
    ]
    if not turns:
        raise InputError(f"{options.prompts} has no prompts.")
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    return [Prompt(kind, tokenizer(text)["input_ids"]) for kind, text in turns[: options.limit]]


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
