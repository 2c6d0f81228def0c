"""Decoding of a pretrained text model by kinds of prompts, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHOWN = ("prompt-lookup", "cascade", "imitation")


def text() -> str:
    """Return the figures of greedy and of sampled replies."""
    greedy, sampled = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("gemma-text", "gemma-text-sampled")
    )
    ways = [name for name in SHOWN if name in by_strategy(greedy["results"])]
    titles = " | ".join(f"{way}: speedup | accepted | tokens a pass" for way in ways)
    lines = [
        f"| prompts | ordinary, ms a token | {titles} |",
        f"|---|---:|{'---:|' * 3 * len(ways)}",
        row("all", by_strategy(greedy["results"]), ways),
        *(row(kind, by_strategy(found), ways) for kind, found in greedy["kinds"].items()),
    ]
    machine, drawn = greedy["hardware"], by_strategy(sampled["results"])
    at_one = ", ".join(
        f"{way} {speedup(drawn[way])}, {drawn[way]['acceptance_rate']:.0%} accepted"
        for way in SHOWN
        if way in drawn
    )
    replies = by_strategy(greedy["results"])
    same = all(row["identical"] for row in (*replies.values(), *drawn.values()))
    questions = drawn["autoregressive"]["replies"]
    lines += [
        "",
        (
            f"Medians (quartiles) over {replies['autoregressive']['replies']} prompts that no draft"
            f" has seen, {greedy['max_new_tokens']} tokens each, greedy, a batch of one,"
            f" {greedy['dtype']}, {machine['threads']} threads of {machine['processor']}."
            f" {'Every token is' if same else 'Not every token is'} that of `transformers`' own"
            f" `generate`, and of ordinary decoding at temperature {sampled['temperature']:g}"
            f" ({questions} prompts, {sampled['max_new_tokens']} tokens each): {at_one}."
        ),
    ]
    return "\n".join(lines)


def sentence() -> str:
    """Return what prompt lookup does for a pretrained model, alone and with a draft."""
    greedy = json.loads((RESULTS / "gemma-text.json").read_text())
    found = by_strategy(greedy["results"])
    return (
        "With weights that others trained, Gemma 3 270M on text, `prompt-lookup` alone decodes"
        f" {speedup(found['prompt-lookup'])} as fast\nas our ordinary decoding, and"
        f" {speedup(found['cascade'])} with a draft beside it, token for token `generate`'s,"
        f"\nover {found['autoregressive']['replies']} prompts of {len(greedy['kinds'])} kinds"
        " ([recipe](recipes/gemma3-270m))."
    )


def larger() -> str:
    """Return what drafts do for the example model of 135 million weights, in a sentence."""
    scenes, photos, peers = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("large-scenes", "large-photos", "decoding_peers_large")
    )
    found = peers["fastest"]["float32"]["any"]
    median, low, high = found["speedup"]
    return (
        "Grown to 135 million weights, which say the same, the example model describes scenes"
        f"\n{speedup(by_strategy(scenes['results'])['imitation'])} and photos"
        f" {speedup(by_strategy(photos['results'])['imitation'])} as fast with drafts as without,"
        f" and its decoder goes on with text\n{median:.2f}x ({low:.2f}-{high:.2f}) as fast as the"
        " fastest of `transformers`, vLLM, OpenVINO GenAI and llama.cpp, their own speculation"
        "\nincluded ([figures](docs/evaluation.md#beside-other-engines))."
    )


def by_strategy(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return rows of results by their strategies."""
    return {row["strategy"]: row for row in rows}


def speedup(row: dict[str, Any]) -> str:
    """Return a speedup with its quartiles."""
    low, high = row["speedup_iqr"]
    return f"{row['speedup']:.2f}x ({low:.2f}-{high:.2f})"


def row(title: str, found: dict[str, dict[str, Any]], ways: list[str]) -> str:
    """Return a line of the table."""
    cells = " | ".join(
        f"{speedup(found[way])} | {found[way]['acceptance_rate']:.0%}"
        f" | {found[way]['acceptance_length']:.2f}"
        for way in ways
    )
    return f"| {title} | {found['autoregressive']['tpot_ms']:.1f} | {cells} |"
