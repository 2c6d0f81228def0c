"""What a run found, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fastvlm.functional.statistics import Spread
from peers.contenders import CASCADE, COMPILED, DRAFT, ENGINES, LOOKUP
from peers.environments import ENVIRONMENTS
from peers.rounds import LIKELIHOOD, REFERENCE, Journal, Prompt, Record
from peers.workers.worker_protocol import ORDINARY

TITLES = {
    ORDINARY: "",
    LOOKUP: ", prompt lookup",
    DRAFT: ", draft",
    CASCADE: ", cascade of both",
    COMPILED: ", compiled, static cache",
}
FASTEST = {
    "ordinary": "fastvlm over the fastest peer, without drafts",
    "any": "fastvlm over the fastest peer, with drafts",
}
LOSSLESS = ("float32", "bfloat16")


def summary(journal: Journal, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        journal: Its records.
        prompts: The prompts that they are of.
    """
    asked = dict.fromkeys(
        (record["dtype"], record["engine"], record["way"])
        for record in journal.records
        if "way" in record and record["way"] != LIKELIHOOD
    )
    loads = [record["load"] for record in journal.records]
    return {
        "load_average": {"median": _median(loads), "highest": max(loads, default=None)},
        "prompts": len(prompts),
        "kinds": sorted({prompt.kind for prompt in prompts}),
        "engines": _abouts(journal),
        "results": [_result(journal, prompts, *key) for key in asked],
        "fastest": {
            dtype: _fastest(journal, [key for key in asked if key[0] == dtype])
            for dtype in dict.fromkeys(dtype for dtype, *_ in asked)
        },
    }


def _fastest(journal: Journal, keys: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Return the fastest of ours and of the peers in a precision, and the speedup over the peer.

    Each is found among ordinary decoding alone, and among all ways. `transformers` compiled is
    ordinary decoding, too: it drafts nothing.
    """
    found: dict[str, Any] = {}
    for name, ways in (("ordinary", (ORDINARY, COMPILED)), ("any", None)):
        times = {
            (engine, way): _replies(journal, dtype, engine, way)
            for dtype, engine, way in keys
            if (ways is None or way in ways)
            and not any("error" in one for one in journal.find(dtype=dtype, engine=engine, way=way))
        }
        sides = []
        for peers in (False, True):
            medians = {
                key: statistics.median(one["tpot_ms"] for one in replies.values())
                for key, replies in times.items()
                if replies and (key[0] in ENVIRONMENTS) == peers
            }
            sides.append(min(medians, key=lambda key: medians[key]) if medians else None)
        ours, theirs = sides
        speedup = _speedup(times[theirs], times[ours]) if ours and theirs else None
        if ours and theirs and speedup:
            found[name] = {"ours": [*ours], "theirs": [*theirs], "speedup": speedup}
    return found


def _abouts(journal: Journal) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for record in journal.records:
        if "about" in record:
            found.setdefault(record["engine"], {})[record["dtype"]] = record["about"]
    return found


def _result(
    journal: Journal, prompts: Sequence[Prompt], dtype: str, engine: str, way: str
) -> dict[str, Any]:
    """Return the figures of a way of decoding, or why there are none."""
    key = {"dtype": dtype, "engine": engine}
    named = {**key, "way": way}
    own = _replies(journal, dtype, engine, way)
    for record in journal.find(**named):
        if "error" in record:
            return {**named, "replies": len(own), "error": record["error"]}
    ordinary = _replies(journal, dtype, engine, ORDINARY)
    exact = _replies(journal, "float32", REFERENCE, ORDINARY)
    reference = _replies(journal, dtype, REFERENCE, ORDINARY) if dtype in LOSSLESS else {}
    passes = {number: one["passes"] for number, one in own.items() if "passes" in one}
    found = {
        **named,
        "replies": len(own),
        "tokens_per_second": _spread([1e3 / one["tpot_ms"] for one in own.values()]),
        "ttft_ms": _spread([one["ttft_ms"] for one in own.values()]),
        "speedup": _speedup(ordinary, own) if way != ORDINARY else None,
        "tokens_per_pass": _rounded(
            sum(len(own[number]["token_ids"]) - 1 for number in passes) / sum(passes.values())
            if passes
            else None
        ),
        "same_as_ordinary": _same(own, ordinary) if way != ORDINARY else None,
        "same_as_transformers": _same(own, reference),
        "same_as_float32": _same(own, exact),
        "share_before_first_difference": _agreement(own, exact),
        "speedup_by_kind": {
            kind: _speedup(ordinary, {n: one for n, one in own.items() if prompts[n].kind == kind})
            for kind in sorted({prompts[number].kind for number in own})
            if way != ORDINARY
        },
    }
    if way == ORDINARY:
        found |= _quality(journal, key)
    return found


def _replies(journal: Journal, dtype: str, engine: str, way: str) -> dict[int, Record]:
    """Return the replies of a way of decoding by their prompts' numbers."""
    found = journal.find(dtype=dtype, engine=engine, way=way)
    return {record["prompt"]: record for record in found if "prompt" in record}


def _quality(journal: Journal, key: Record) -> dict[str, Any]:
    """Return the mean log-likelihood of a token of the float32 replies, or why there is none."""
    for record in journal.find(**key, way=LIKELIHOOD):
        return {"likelihood_error": record["error"]}
    scored = [record for record in journal.find(**key) if "scored" in record]
    if not scored:
        return {"log_likelihood": None}
    total = sum(record["log_likelihood"] for record in scored)
    return {"log_likelihood": round(total / sum(record["tokens"] for record in scored), 4)}


def _speedup(slow: dict[int, Record], fast: dict[int, Record]) -> list[float] | None:
    """Return the speedup over other replies to the same prompts: the median and quartiles."""
    both = [number for number in fast if number in slow]
    return _spread([slow[number]["tpot_ms"] / fast[number]["tpot_ms"] for number in both])


def _same(own: dict[int, Record], known: dict[int, Record]) -> list[int] | None:
    """Return how many replies have the same tokens as others to their prompts, and of how many."""
    both = [number for number in own if number in known]
    if not both:
        return None
    return [sum(own[n]["token_ids"] == known[n]["token_ids"] for n in both), len(both)]


def _agreement(own: dict[int, Record], known: dict[int, Record]) -> float | None:
    """Return the mean share of a reply before its first token that differs from another's."""
    shares = []
    for number in own:
        if number in known:
            one, other = own[number]["token_ids"], known[number]["token_ids"]
            pairs = enumerate(zip(one, other, strict=True))
            same = next((place for place, (a, b) in pairs if a != b), len(one))
            shares.append(same / len(one))
    return _rounded(statistics.mean(shares) if shares else None)


def _spread(values: Sequence[float]) -> list[float] | None:
    if not values:
        return None
    spread = Spread.of(values)
    return [round(value, 3) for value in (spread.median, spread.low, spread.high)]


def _median(values: Sequence[float]) -> float | None:
    return _rounded(statistics.median(values) if values else None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def table(found: dict[str, Any]) -> str:
    """Return the figures of a run as Markdown."""
    dtypes = found["dtypes"]
    rows = {(one["engine"], one["way"], one["dtype"]): one for one in found["results"]}
    named = [
        (engine, way)
        for engine, about in ENGINES.items()
        for way in about.ways
        if any((engine, way, dtype) in rows for dtype in dtypes)
    ]
    lines = [
        f"| tokens/s (over its own ordinary decoding) | {' | '.join(dtypes)} |",
        f"|---|{'---:|' * len(dtypes)}",
    ]
    for engine, way in named:
        cells = [_speed(rows.get((engine, way, dtype))) for dtype in dtypes]
        lines.append(f"| {ENGINES[engine].title}{TITLES[way]} | {' | '.join(cells)} |")
    for name, title in FASTEST.items():
        cells = [_ahead(found["fastest"].get(dtype, {}).get(name)) for dtype in dtypes]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        (
            "| replies as `transformers`' float32; its log-likelihood per token |"
            f" {' | '.join(dtypes)} |"
        ),
        f"|---|{'---:|' * len(dtypes)}",
    ]
    for engine in dict.fromkeys(engine for engine, _ in named):
        cells = [_fidelity(rows.get((engine, ORDINARY, dtype))) for dtype in dtypes]
        lines.append(f"| {ENGINES[engine].title} | {' | '.join(cells)} |")
    lines += ["", _caption(found)]
    errors: dict[str, list[str]] = {}
    for one in found["results"]:
        if "error" in one:
            name = f"{ENGINES[one['engine']].title}{TITLES[one['way']]} in {one['dtype']}"
            errors.setdefault(one["error"].replace("`", "'"), []).append(name)
    lines += ["", *(f"- {'; '.join(names)}: `{error}`" for error, names in errors.items())]
    return "\n".join(lines).rstrip()


def _speed(row: dict[str, Any] | None) -> str:
    if row is None or "error" in row:
        return "-"
    median, low, high = row["tokens_per_second"]
    ratio = f", {row['speedup'][0]:.2f}x" if row["speedup"] else ""
    return f"{median:.1f} ({low:.1f}-{high:.1f}){ratio}"


def _ahead(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    ours, theirs = (f"{ENGINES[engine].title}{TITLES[way]}" for engine, way in
                    (row["ours"], row["theirs"]))  # fmt: skip
    median, low, high = row["speedup"]
    return f"{median:.2f}x ({low:.2f}-{high:.2f}): {ours}; {theirs}"


def _fidelity(row: dict[str, Any] | None) -> str:
    if row is None or "error" in row:
        return "-"
    same = row["same_as_float32"]
    said = f"{same[0]} of {same[1]}" if same else "-"
    likelihood = row.get("log_likelihood")
    return f"{said}; {'-' if likelihood is None else format(likelihood, '.3f')}"


def _caption(found: dict[str, Any]) -> str:
    load = found["load_average"]
    return (
        f"{found['model']}: greedy replies of {found['max_new_tokens']} tokens to"
        f" {found['prompts']} prompts of {len(found['kinds'])} kinds, a batch of one,"
        f" {found['threads']} threads of {found['hardware']['processor']}; medians (quartiles) of"
        f" tokens/s after the first token, the engines in turns. In float32 and bfloat16 all"
        f" replies have the tokens of `transformers`' own in that precision"
        f"{_but(found, 'same_as_transformers')}. In each precision, all replies have the tokens of"
        f" the engine's own ordinary decoding{_but(found, 'same_as_ordinary')}. The load average"
        f" of the machine was {load['median']:.1f} in the median, {load['highest']:.1f} at most."
    )


def _but(found: dict[str, Any], figure: str) -> str:
    """Return the ways of decoding of which not all replies are the same, to end a sentence with."""
    unequal = [
        f"{ENGINES[one['engine']].title}{TITLES[one['way']]} in {one['dtype']} {same[0]}"
        for one in found["results"]
        if (same := one.get(figure)) and same[0] < same[1]
    ]
    return f", but {', '.join(unequal)}" if unequal else ""
