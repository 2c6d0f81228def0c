"""Replies of many JSON schemas: valid, the same with and without drafts, and how long they take.

Schemas are those of the public JSON Schema test suite that the grammar library reads, and shapes
that APIs are asked for (`api_schemas.json`). Each is asked for without drafts and with them, one
after the other, greedily and some of them sampled; each reply is checked by the library jsonschema,
formats included. A reply that the limit of tokens cuts is no JSON: it counts as cut, not as valid,
and only its tokens are compared.
Then schemas that can't be satisfied or compiled (`bad_schemas.json`, and large ones made here) are
sent to the server: each is to be an error of OpenAI's shape.

The suite is in the source distribution of jsonschema; nothing is downloaded here:

    pip download jsonschema --no-binary :all: --no-deps && tar xf jsonschema-*.tar.gz
    python benchmarks/schemas.py --suite jsonschema-*/json/tests [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import torch
from fastapi.testclient import TestClient
from jsonschema.validators import validator_for

from fastvlm import InputError, StructuredOutput, VisionLanguageModel, load
from fastvlm.decoding import Request
from fastvlm.evaluation.measuring import hardware, rotated, run_requests
from fastvlm.serving.app import Server
from fastvlm.serving.settings import ServerSettings
from fastvlm_example import HELD_OUT_SCENES, SCENE_PROMPT
from fastvlm_example.scenes import render, sample

HERE = Path(__file__).parent
DRAFTS = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft4": jsonschema.Draft4Validator,
}
"""The published drafts that the grammar library reads, by the suite's folders."""
UNCHECKED = "ecmascript-regex.json"
"""Patterns of JavaScript, which jsonschema checks by Python's rules."""
FORMATS = ("date", "email", "ipv4", "ipv6", "uuid")
"""Formats that jsonschema checks without further packages."""
STRATEGIES = ("autoregressive", "imitation")
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "seed": 7}}
SECONDS_FOR_AN_ERROR = 1.0


def suite_schemas(suite: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the schema and the validator of each of the suite's schemas."""
    for draft, validator in DRAFTS.items():
        for file in sorted((suite / draft).rglob("*.json")):
            if file.name == UNCHECKED:
                continue
            for case in json.loads(file.read_text()):
                name = f"{file.relative_to(suite)}: {case['description']}"
                yield name, case["schema"], validator


def api_schemas() -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the schema and the validator of each shape that APIs are asked for."""
    for name, schema in json.loads((HERE / "api_schemas.json").read_text()).items():
        yield f"api: {name}", schema, jsonschema.Draft202012Validator


def nested(depth: int) -> Any:
    """Return lists in lists."""
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def bad_schemas() -> dict[str, Any]:
    """Return schemas that can't be satisfied or compiled."""
    found: dict[str, Any] = json.loads((HERE / "bad_schemas.json").read_text())
    texts = {f"property {i}": {"type": "string"} for i in range(20_000)}
    patterns = {f"^p{i}x[a-z]*$": {"type": "integer"} for i in range(400)}
    choices = [
        {"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {}}} for j in range(6)]}
        for i in range(8)
    ]
    return found | {
        "lists in lists": nested(500),
        "many properties": {"type": "object", "properties": texts},
        "a long enumeration": {"enum": [f"value {i}" for i in range(50_000)]},
        "patterns of names": {"type": "object", "patternProperties": patterns},
        "choices of choices": {"allOf": choices},
        "a regex of regexes": {
            "type": "string",
            "allOf": [{"pattern": f"[a-z]*{chr(97 + i)}{i}[a-z]*"} for i in range(16)],
        },
    }


def is_valid(text: str, schema: Any, validator: Any) -> bool:
    """Return whether a reply is JSON of a schema; numbers are read as they are written."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    kind = validator_for(schema, default=validator)
    checker = jsonschema.FormatChecker(FORMATS)
    return bool(kind(exact, format_checker=checker).is_valid(json.loads(text, parse_float=Decimal)))


def distinct(
    schemas: Iterator[tuple[str, Any, Any]], vlm: VisionLanguageModel, refused: Counter[str]
) -> list[tuple[str, Any, Any]]:
    """Return the schemas that can be asked for, each once, and count why others can't."""
    seen: set[str] = set()
    found = []
    for name, schema, validator in schemas:
        text = json.dumps(schema)
        if text in seen:
            continue
        seen.add(text)
        try:
            vlm.builder.grammars.constraint(StructuredOutput("json", schema), vlm.end_tokens)
        except InputError as error:
            reason = str(error).removeprefix("The json can't be used: ")
            # What stands behind it is of this schema alone.
            refused[re.split("['\"\\[:(/0-9-]", reason)[0].strip()] += 1
        else:
            found.append((name, schema, validator))
    return found


def decode_all(
    vlm: VisionLanguageModel, schemas: list[tuple[str, Any, Any]], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return what came of each way of choosing tokens, over all schemas that there is time for."""
    ending = time.monotonic() + 60 * options.minutes
    image = render(sample(HELD_OUT_SCENES), vlm.image_size)
    run_requests(vlm.engine, [vlm.request(SCENE_PROMPT, image, max_new_tokens=4)])
    found: dict[str, dict[str, Any]] = {
        way: {"asked": 0, "valid": 0, "invalid": [], "cut": [], "differ": [], "tokens": 0,
              "seconds": dict.fromkeys(STRATEGIES, 0.0)}
        for way in WAYS
    }  # fmt: skip
    for number, (name, schema, validator) in enumerate(schemas):
        if time.monotonic() > ending:
            break
        form = StructuredOutput("json", schema)
        vlm.builder.grammars.constraint(form, vlm.end_tokens)
        for way, sampling in WAYS.items():
            if sampling and number % options.sampled_every:
                continue
            own = found[way]
            replies: dict[str, Request] = {}
            for strategy in rotated(STRATEGIES, number):
                started = time.perf_counter()
                replies[strategy] = request = vlm.request(
                    SCENE_PROMPT, image, strategy=strategy, structured=form,
                    max_new_tokens=options.limit, **sampling,
                )  # fmt: skip
                run_requests(vlm.engine, [request])
                own["seconds"][strategy] += time.perf_counter() - started
            plain = replies["autoregressive"]
            own["asked"] += 1
            own["tokens"] += len(plain.output_token_ids)
            if any(one.output_token_ids != plain.output_token_ids for one in replies.values()):
                own["differ"].append(name)
            if plain.finish_reason != "stop":
                own["cut"].append(name)
            elif is_valid(vlm.reply(plain).text, schema, validator):
                own["valid"] += 1
            else:
                own["invalid"].append(name)
    return found


def ask_for_bad_ones(vlm: VisionLanguageModel) -> dict[str, Any]:
    """Return how the server answers schemas that can't be."""
    seconds: dict[str, float] = {}
    wrong: list[str] = []
    app = Server(vlm, "example", ServerSettings()).app()
    with TestClient(app, base_url="http://localhost") as client:
        for name, schema in bad_schemas().items():
            body = {
                "messages": [{"role": "user", "content": "What is it?"}],
                "max_tokens": 16,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "reply", "schema": schema},
                },
            }
            started = time.perf_counter()
            answer = client.post("/v1/chat/completions", json=body)
            seconds[name] = time.perf_counter() - started
            error = answer.json().get("error", {})
            shaped = set(error) == {"message", "type", "param", "code"} and error["message"]
            if answer.status_code != httpx.codes.BAD_REQUEST or not shaped:
                wrong.append(name)
    slowest = max(seconds, key=lambda name: seconds[name])
    return {
        "schemas": len(seconds),
        "errors_of_openais_shape": len(seconds) - len(wrong),
        "no_error": wrong,
        "within_a_second": sum(taken < SECONDS_FOR_AN_ERROR for taken in seconds.values()),
        "slowest": [slowest, round(seconds[slowest], 3)],
        "median_seconds": round(sorted(seconds.values())[len(seconds) // 2], 4),
    }


def main() -> None:
    """Ask for all schemas, and for those that can't be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, required=True, help="The suite's folder `tests`.")
    parser.add_argument("--schemas", type=int, help="The most schemas; all, if not given.")
    parser.add_argument("--sampled-every", type=int, default=10, help="Of how many one is sampled.")
    parser.add_argument("--limit", type=int, default=80, help="The maximum of tokens in a reply.")
    parser.add_argument("--minutes", type=float, default=60, help="When to ask for no more.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    vlm = load()
    refused: Counter[str] = Counter()
    api = distinct(api_schemas(), vlm, Counter())
    schemas = [*api, *distinct(suite_schemas(options.suite), vlm, refused)]
    random.Random(1).shuffle(schemas)
    schemas = schemas[: options.schemas]
    without_draft = {
        json.dumps(
            {k: v for k, v in schema.items() if k != "$schema"} if schema is not True else {}
        )
        for _, schema, _ in schemas
    }
    out: dict[str, Any] = {
        "hardware": hardware(),
        "settings": {
            name: getattr(options, name) for name in ("limit", "sampled_every", "threads")
        },
        "schemas": {
            "read": len(schemas),
            "different_but_for_their_draft": len(without_draft),
            "of_apis": len(api),
            "of_the_suite_refused": sum(refused.values()),
            "why": dict(refused.most_common()),
        },
        "replies": decode_all(vlm, schemas, options),
        "bad": ask_for_bad_ones(vlm),
    }
    print(json.dumps(out, indent=1))  # noqa: T201
    if options.json is not None:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
