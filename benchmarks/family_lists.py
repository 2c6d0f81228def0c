"""Which models of transformers decode as `generate` does, as Markdown from the committed scan."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

SCAN = Path(__file__).parent / "results" / "families.json"
KINDS = {
    "text": "text",
    "images": "images and text",
    "audio": "audio and text",
    "encoder-decoder": "encoder-decoders",
}
GENERAL = "GeneralDecoder"
UNTESTED = "not tested: transformers doesn't build it so small here, or doesn't generate from text"
REASONS = [
    (
        r"layers of the kind ",
        "layers keep a state that can't be rolled back when a draft is rejected",
    ),
    (r"which has no ", "the decoder's modules are of a form that fastvlm doesn't know"),
    (r"is given (?!a mask|rotations)", "layers are given what fastvlm doesn't know"),
    (r"changes embeddings before", "embeddings are changed before the first layer in an own way"),
    (r"changes its LM head's", "the LM head's outputs are changed in an own way"),
    (r"give other states", "layers called one by one give other states than the decoder"),
    (r"object has no attribute", "the configuration has other names than those of other decoders"),
    (r"can't be observed|can't split", "the decoder's `forward` doesn't run on embeddings alone"),
]
"""What a refusal says, and what it is in a few words."""


def supported() -> str:
    """Return how many classes decode as `generate` does, in a sentence."""
    scan = json.loads(SCAN.read_text())
    rows: list[dict[str, Any]] = scan["families"]
    count = {name: sum(row["result"] == name for row in rows) for name in ("equal", "refused")}
    return (
        f"Of the {len(rows)} generating classes of transformers {scan['transformers']},"
        f" {count['equal']} decode to the tokens of `generate` and {count['refused']} are refused;"
        f" {len(rows) - sum(count.values())} could not be tested."
    )


def families() -> str:
    """Return the lists of model types by result, and of adapters, as Markdown."""
    rows: list[dict[str, Any]] = json.loads(SCAN.read_text())["families"]
    lines = [
        f"{supported()} Listed by `model_type`.",
        "",
        "| equal to `generate` | model types |",
        "|---|---|",
    ]
    for kind, title in KINDS.items():
        found = [row for row in rows if row["result"] == "equal" and row["kind"] == kind]
        lines.append(f"| {title} ({len(found)}) | {_types(found)} |")
    lines += ["", "| refused, because | model types |", "|---|---|"]
    lines += _grouped(rows)
    lines += ["", "| adapter | model types |", "|---|---|"]
    adapters: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["result"] == "equal" and row["adapter"] != GENERAL:
            adapters[row["adapter"]].append(row)
    lines += [f"| `{name}` | {_types(found)} |" for name, found in sorted(adapters.items())]
    lines.append(f"| `{GENERAL}` | all others |")
    alone = [row for row in rows if row["alone"]]
    lines += [
        "",
        (
            "Rows of a padded batch have the tokens that they have alone. Padding changes what"
            f" `generate` itself makes of {_types(alone)} here, and there the two differ."
        ),
    ]
    return "\n".join(lines)


def _grouped(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each reason, the most frequent first."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["result"] == "refused":
            groups[in_short(row["reason"])].append(row)
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    untested = [row for row in rows if row["result"] == "untested"]
    return [
        f"| {reason} ({len(found)}) | {_types(found)} |"
        for reason, found in [*ordered, (UNTESTED, untested)]
        if found
    ]


def in_short(reason: str) -> str:
    """Return what a refusal says, in a few words."""
    for pattern, text in REASONS:
        if re.search(pattern, reason):
            return text
    return reason


def _types(rows: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({row["model_type"] for row in rows}))
