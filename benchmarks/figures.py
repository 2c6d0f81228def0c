"""Write the figures of README and docs from the committed results, so that none is ever typed.

Run `python benchmarks/figures.py` after new results are committed; a test holds them together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scale_figures
import serving_figures
import text_figures
from family_lists import families, supported
from peers.report import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LEAST_CIDER = 0.001
RUNS = {"scenes": "rendered scenes", "photos": "photos"}


def read(name: str) -> Any:
    """Return a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def decoding() -> str:
    """Return the figures of decoding as Markdown."""
    runs = {name: read(name) for name in RUNS}
    rows = {name: {row["strategy"]: row for row in run["results"]} for name, run in runs.items()}
    titles = " | ".join(
        f"{title}: ms a token | speedup | against `transformers` | tokens a pass"
        for title in RUNS.values()
    )
    lines = [f"| strategy | {titles} |", f"|---|{'---:|' * 4 * len(RUNS)}"]
    for strategy in rows["scenes"]:
        cells = " | ".join(cell for name in RUNS for cell in _cells(rows[name][strategy]))
        lines.append(f"| {strategy} | {cells} |")
    hardware = runs["scenes"]["hardware"]
    replies = " and ".join(
        f"{found['autoregressive']['replies']} descriptions of {RUNS[name]} of"
        f" {found['autoregressive']['tokens']:.0f} tokens"
        for name, found in rows.items()
    )
    lines += [
        "",
        (
            f"Medians (quartiles) over {replies}; batch of one, greedy, float32,"
            f" {hardware['threads']} threads of {hardware['processor']}, decoded by ONNX Runtime"
            f" {hardware['onnxruntime']}. Speedup is against our own autoregressive decoding in the"
            " same run, and every reply has the same tokens as `transformers`' own `generate`."
        ),
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["speedup_iqr"]
    least, most = row["speedup_vs_transformers_iqr"]
    return (
        f"{row['tpot_ms']:.2f}",
        f"{row['speedup']:.2f}x ({low:.2f}-{high:.2f})",
        f"{row['speedup_vs_transformers']:.2f}x ({least:.2f}-{most:.2f})",
        f"{row['acceptance_length'] or 1:.2f}",
    )


PRECISIONS = ("float32", "bfloat16")


def first_token() -> str:
    """Return the times to first token as Markdown."""
    runs, encoders = {dtype: read(f"ttft-{dtype}") for dtype in PRECISIONS}, read("encoder")
    lines = [
        (
            "| model | px | visual tokens | GFLOP"
            + "".join(
                f" | {dtype}: encoder ms | prefill ms | TTFT ms | speedup over LLaVA-OneVision"
                for dtype in PRECISIONS
            )
            + " |"
        ),
        "|---|---:|---:|---:|" + 4 * len(PRECISIONS) * "---:|",
    ]
    arithmetic = {}
    for rows in zip(*(run["results"] for run in runs.values()), strict=True):
        name, side = rows[0]["name"], rows[0]["side"]
        arithmetic[name, side] = sum(rows[0]["gflop"].values())
        cells = [name, str(side), f"{rows[0]['visual_tokens']:,}", f"{arithmetic[name, side]:,.0f}"]
        for run, row in zip(runs.values(), rows, strict=True):
            [slowest] = (
                one["ttft_ms"][0]
                for one in run["results"]
                if one["name"].startswith("LLaVA-OneVision")
            )
            times = [row["ms"]["vision"][0], row["ms"]["prefill"][0], row["ttft_ms"][0]]
            cells += [*(f"{time:,.0f}" for time in times), f"{slowest / times[-1]:.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    run, most = runs["float32"], max(arithmetic.values())
    machine = run["hardware"]
    dates = ", ".join(f"{dtype} on {one['date'][:10]}" for dtype, one in runs.items())
    ratios = ", ".join(
        f"{found['ratio'][0]:.2f}x at {found['size']} px" for found in encoders["results"]
    )
    lines += [
        "",
        (
            f"Medians of {run['results'][0]['rounds']} rounds in each precision ({dates}), the"
            f" models in turns, at full size with random weights, {machine['threads']} threads of"
            f" {machine['processor']} with AVX-512 and bfloat16; FastVLM through our engine, the"
            " other through `transformers`. GFLOP are counted, a multiplication and an addition as"
            f" two: at 1024 px there are {most / arithmetic['FastVLM-0.5B', 1024]:.1f} times fewer"
            " than of LLaVA-OneVision, and both keep the processor near what it can multiply, so"
            " that TTFT can hardly be further apart than that. FastViTHD alone encodes sooner than"
            f" timm's fused one as `transformers` runs it: {ratios}. More models, measured on"
            " another machine: `benchmarks/results/ttft.md`."
        ),
    ]
    return "\n".join(lines)


def engines(name: str) -> str:
    """Return what `decoding_peers.py` found of a model, as Markdown."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return "Not measured yet."
    return table(json.loads(file.read_text()))


def tables() -> str:
    """Return what `fastvlm evaluate` found, strategies by benchmarks, as Markdown."""
    folder = sorted(RESULTS.glob("20??-??-??"))[-1]
    report = json.loads((folder / "report.json").read_text())
    plan, rows = report["plan"], report["results"]
    tasks = plan["tasks"]
    # Of replies that are no captions CIDEr says nothing.
    scored = {row["task"] for row in rows if row["scores"]["CIDEr"] >= LEAST_CIDER}
    titles = ["speedup", "whole reply", "accepted", "tokens a pass"]
    heading = [
        f"{tasks[task]['name']}: {title}"
        for task in tasks
        for title in (["CIDEr", *titles] if task in scored else titles)
    ]
    lines = [f"| strategy | {' | '.join(heading)} |", f"|---|{'---:|' * len(heading)}"]
    for strategy in plan["strategies"]:
        own = {row["task"]: row for row in rows if row["strategy"] == strategy}
        cells = " | ".join(
            cell for task in tasks for cell in _task_cells(own[task])[0 if task in scored else 1 :]
        )
        lines.append(f"| {strategy} | {cells} |")
    different = sum(row["different"] for row in rows)
    replies = sum(row["speed"]["replies"] for row in rows)
    asked = " and ".join(
        f"{task['items']:,} photos of {task['name']}"
        f" (replies of {_median(rows, name, 'tokens'):.0f} tokens)"
        for name, task in tasks.items()
    )
    session = report["sessions"][0]
    machine = session["hardware"]
    where = f"benchmarks/results/{folder.name}/report.md"
    lines += [
        "",
        (
            f"{asked}, medians (quartiles); {different or 'none'} of {replies:,} replies has other"
            f" tokens than ordinary decoding. {plan['dtype']}, {plan['threads']} thread of"
            f" {machine['processor']}, {session['date'][:10]}, commit {session['commit']}, torch"
            f" {machine['torch']}, transformers {machine['transformers']}. All of it, with plots:"
            f" `{where}`."
        ),
    ]
    return "\n".join(lines)


def _task_cells(row: dict[str, Any]) -> list[str]:
    speed = row["speed"]
    rate, length = speed["acceptance_rate"], speed["acceptance_length"]
    return [
        f"{row['scores']['CIDEr']:.4f}",
        _times(speed["speedup"]),
        f"{speed['speedup_end_to_end']['median']:.2f}x",
        "-" if rate is None else f"{rate['median']:.0%}",
        f"{length['median']:.2f}",
    ]


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}x ({spread['low']:.2f}-{spread['high']:.2f})"


def _median(rows: list[dict[str, Any]], task: str, figure: str) -> float:
    found: float = next(row["speed"][figure]["median"] for row in rows if row["task"] == task)
    return found


def sizes() -> str:
    """Return how the speedup grows with the model, beside what the cost model says, as Markdown."""
    lines = [
        (
            "| model | replies about | a step, ms | a drafted token, ms | a verify, ms"
            " | tokens a pass | predicted | measured |"
        ),
        f"|---|---|{'---:|' * 6}",
    ]
    for name in ("small", "large"):
        costs = read(f"costs-{name}")
        size = f"{costs['parameters'] / 1e6:.0f} M, {costs['layers']} layers"
        lines += [
            f"| {size} | {run['images']} | {run['ordinary_ms']:.2f} | {run['drafted_ms']:.2f}"
            f" | {run['verify_ms']:.2f} | {run['acceptance_length']:.2f}"
            f" | {run['predicted']:.2f}x | {_times(run['speedup'])} |"
            for run in costs["runs"]
        ]
    machine = costs["hardware"]
    lines += ["", f"float32, {machine['threads']} threads of {machine['processor']}."]
    return "\n".join(lines)


def packed() -> str:
    """Return what passes cost with packed weights and without, in steps, as Markdown."""
    record = read("packed")
    decoders = record["decoders"]
    titles = " | ".join(f"{found['name']}: plain | packed" for found in decoders)
    lines = [f"| positions | {titles} |", f"|---:|{'---:|' * 2 * len(decoders)}"]
    for row in zip(*(found["passes"] for found in decoders), strict=True):
        cells = " | ".join(
            f"{one[kind][0]:,.1f} ms, {one[kind][0] / found['passes'][0][kind][0]:.2f}x"
            for one, found in zip(row, decoders, strict=True)
            for kind in ("plain", "packed")
        )
        lines.append(f"| {row[0]['positions']} | {cells} |")
    machine = record["hardware"]
    lines += [
        "",
        (
            "Medians, plain and packed in turns; the ratio is to a pass over one position. float32,"
            f" {machine['threads']} threads of {machine['processor']}, {record['date'][:10]}."
        ),
    ]
    return "\n".join(lines)


def runtimes() -> str:
    """Return what passes take in torch and in ONNX Runtime, as Markdown."""
    record = read("runtimes")
    passes = ("ordinary", "verify", "draft")
    named = {"ordinary": "a step", "draft": "a draft step"}
    named["verify"] = f"a verify of {record['verify_positions']}"
    titles = [f"{one['name']}: {named[kind]}" for one in record["decoders"] for kind in passes]
    lines = [f"| ms | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for runtime in record["decoders"][0]["runtimes"]:
        cells = [
            f"{median:.2f} ({low:.2f}-{high:.2f})"
            for one in record["decoders"]
            for median, low, high in (one["runtimes"][runtime][kind] for kind in passes)
        ]
        lines.append(f"| {runtime} | {' | '.join(cells)} |")
    machine = record["hardware"]
    lines += [
        "",
        (
            f"Medians (quartiles) in turns, {machine['threads']} threads of {machine['processor']},"
            f" {record['date'][:10]}."
        ),
    ]
    return "\n".join(lines)


def ablation(record: dict[str, Any]) -> str:
    """Return the figures of drafts that were taught otherwise, as Markdown."""
    titles = " | ".join(f"{part}: accepted | tokens a pass | speedup" for part in RUNS)
    lines = [f"| draft | {titles} |", f"|---|{'---:|' * 3 * len(RUNS)}"]
    for name, parts in record["drafts"].items():
        cells = " | ".join(
            f"{parts[part]['acceptance_of_4']:.3f} | {parts[part]['acceptance_length']:.2f}"
            f" | {_times(parts[part]['speedup'])}"
            for part in RUNS
        )
        lines.append(f"| {name} | {cells} |")
    machine = record["hardware"]
    lines += [
        "",
        (
            f"{record['steps']} steps on {record['replies']:,} replies; measured on"
            f" {record['held_out']} unseen scenes and as many photos, interleaved, float32,"
            f" {machine['threads']} thread of {machine['processor']}, {record['date'][:10]}, commit"
            f" {record['commit']}."
        ),
    ]
    return "\n".join(lines)


def uneven() -> str:
    """Return what refilled slots are worth, as Markdown."""
    record = read("before_after")
    lines = [
        "| strategy | tokens/s in batches | tokens/s refilled | speedup | while decoding |",
        f"|---|{'---:|' * 4}",
    ]
    for name, case in record["cases"].items():
        if not name.startswith("uneven"):
            continue
        rates, ratios = case["tokens_per_second"]["in_all"], case["ms_per_token"]
        cells = " | ".join(
            f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
            for ratio in (ratios["in_all"]["ratio"], ratios["decoding"]["ratio"])
        )
        strategy = name.rsplit(", ", 1)[1]
        lines.append(f"| {strategy} | {rates['before']:.0f} | {rates['after']:.0f} | {cells} |")
    machine = record["hardware"]
    lines += [
        "",
        (
            "The example model, interleaved; with drafts a verify of eight rows is bound by"
            f" arithmetic, so filling slots saves less. float32, {machine['threads']} threads of"
            f" {machine['processor']} ({machine['instructions']}), {record['date'][:10]}."
        ),
    ]
    return "\n".join(lines)


def batched() -> str:
    """Return what drafts are worth in batches, as Markdown."""
    record = read("batches")
    kinds = {"scenes": "rendered scenes", "photos": "photos"}
    heads = "".join(
        f" {title}: tokens/s without drafts | with | speedup |" for title in kinds.values()
    )
    lines = [f"| requests |{heads}", f"|---|{'---:|' * 3 * len(kinds)}"]
    for size in record["images"]["photos"]:
        cells = ""
        for kind in kinds:
            row = record["images"][kind][size]
            low, high = row["ratio_iqr"]
            cells += f" {row['ordinary']:.0f} | {row['drafts']:.0f} |"
            cells += f" {row['ratio']:.2f}x ({low:.2f}-{high:.2f}) |"
        lines.append(f"| {size} |{cells}")
    machine = record["hardware"]
    lines += [
        "",
        (
            "The example model with `cascade`, medians (quartiles) of batches, each decoded with"
            " and without drafts in turn; every reply has the tokens that it has alone. float32,"
            f" {machine['threads']} threads of {machine['processor']}."
        ),
    ]
    return "\n".join(lines)


def sampling() -> str:
    """Return what shared noise accepts beside rejection sampling, as Markdown."""
    record = read("sampling")
    lines = [
        (
            "| replies | draft | accepted: rejection | shared noise"
            " | tokens a pass: rejection | shared noise | time of rejection over ours |"
        ),
        f"|---|---|{'---:|' * 5}",
    ]
    for name, case in record["cases"].items():
        temperature, images, network, draft = name.removeprefix("sampled at ").split(", ")
        before, after = case["drafts"]["before"], case["drafts"]["after"]
        ratio = case["ms_per_token"]["ratio"]
        lines.append(
            f"| {images} at {temperature} | {network}, {draft}"
            f" | {before['acceptance_rate']:.3f} | {after['acceptance_rate']:.3f}"
            f" | {before['tokens_per_pass']:.2f} | {after['tokens_per_pass']:.2f}"
            f" | {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f}) |"
        )
    machine = record["hardware"]
    lines += [
        "",
        (
            f"{record['limit']} replies of each kind, interleaved with the commit before, of which"
            " the draws are others; the ratio (quartiles) is of the time per output token. float32,"
            f" {machine['threads']} threads of {machine['processor']}, {record['date'][:10]}."
        ),
    ]
    return "\n".join(lines)


CHARTED = (
    "autoregressive",
    "imitation",
    "imitation-mlp",
    "cascade",
    "early-exit",
    "layer-skip",
    "prompt-lookup",
)
CHART_STYLE = """text { font: 13px system-ui, sans-serif; fill: #24292f } .axis { stroke: #8b949e }
.scenes { fill: #5b7fd6 } .photos { fill: #e0925a }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }"""


def chart() -> str:
    """Return the speedups of every strategy over `transformers` as an SVG: bars, with quartiles."""
    runs = {name: {row["strategy"]: row for row in read(name)["results"]} for name in RUNS}
    speedup = "speedup_vs_transformers"
    most = max(runs[name][one][f"{speedup}_iqr"][1] for name in RUNS for one in CHARTED)
    left, top, step, bar, width = 130, 54, 46, 16, 700
    scale = (width - left - 60) / most
    height = top + step * len(CHARTED) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Speedup over generate of transformers</title>",
        f"<style>{CHART_STYLE}</style>",
        f'<text x="{left}" y="18">Speedup over generate of transformers: medians, quartiles</text>',
    ]
    for place, (name, title) in enumerate(RUNS.items()):
        x = left + 160 * place
        parts.append(f'<rect class="{name}" x="{x}" y="28" width="12" height="12"/>')
        parts.append(f'<text x="{x + 18}" y="39">{title}</text>')
    for row, strategy in enumerate(CHARTED):
        y = top + step * row
        parts.append(f'<text x="{left - 10}" y="{y + 22}" text-anchor="end">{strategy}</text>')
        for place, name in enumerate(RUNS):
            found = runs[name][strategy]
            (low, high), bar_y = found[f"{speedup}_iqr"], y + 2 + place * (bar + 2)
            wide, middle = found[speedup] * scale, bar_y + bar / 2
            parts.append(
                f'<rect class="{name}" x="{left}" y="{bar_y}" width="{wide:.1f}" height="{bar}"/>'
            )
            parts.append(
                f'<line class="axis" x1="{left + low * scale:.1f}" x2="{left + high * scale:.1f}"'
                f' y1="{middle}" y2="{middle}"/>'
            )
            parts.append(
                f'<text x="{left + high * scale + 6:.1f}" y="{bar_y + 13}">'
                f"{found[speedup]:.2f}x</text>"
            )
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class Target:
    """A decoder of a usual size: its layers, width, inner width and vocabulary."""

    name: str
    layers: int
    width: int
    inner: int
    vocabulary: int

    @property
    def layer(self) -> float:
        """Parameters of a layer."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def head(self) -> float:
        """Parameters of the LM head."""
        return self.width * self.vocabulary

    @property
    def size(self) -> float:
        """Parameters that a token passes."""
        return self.layers * self.layer + self.head


TARGETS = (Target("2B", 28, 1536, 8960, 151936), Target("7B", 32, 4096, 11008, 32000))
REPLIES, PROMPT, REPLY, EPOCHS, TOGETHER = 100_000, 600, 100, 3, 64
FLOPS, BYTES, SHARE = 989e12, 3.35e12, 0.4
"""An H100's bfloat16 arithmetic and memory per second, and the share of both that is reached."""


def hours() -> str:
    """Return what a draft costs to train, by arithmetic, as Markdown."""
    lines = [
        "| model | own replies, hours | training, hours | together |",
        "|---|---:|---:|---:|",
    ]
    for target in TARGETS:
        prefill = 2 * target.size * REPLIES * PROMPT / (FLOPS * SHARE)
        decode = REPLIES * REPLY / TOGETHER * 2 * target.size / (BYTES * SHARE)
        tokens = REPLIES * (PROMPT + REPLY) * EPOCHS
        forward = 2 * target.size * tokens
        # The network is a layer; the head is differentiated through at the reply's tokens alone.
        backward = 6 * target.layer * tokens + 4 * target.head * REPLIES * REPLY * EPOCHS
        made, trained = (prefill + decode) / 3600, (forward + backward) / (FLOPS * SHARE) / 3600
        lines.append(f"| {target.name} | {made:.1f} | {trained:.1f} | {made + trained:.1f} |")
    lines += [
        "",
        (
            f"What it costs on one H100, by the arithmetic of the cost model and not measured:"
            f" {REPLIES:,} replies of {REPLY} tokens to prompts of {PROMPT} with their images,"
            f" {TOGETHER} decoded together, {EPOCHS} epochs, {SHARE:.0%} of peak arithmetic and"
            " bandwidth."
        ),
    ]
    return "\n".join(lines)


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "gemma": text_figures.sentence,
        "larger": text_figures.larger,
        "supported": supported,
        "hours": hours,
    },
    "docs/evaluation.md": {
        "figures": decoding,
        "tables": tables,
        "ttft": first_token,
        "engines": lambda: engines("decoding_peers"),
        "engines-small": lambda: engines("decoding_peers_example"),
        "engines-large": lambda: engines("decoding_peers_large"),
    },
    "docs/drafts.md": {
        "ablation": lambda: ablation(read("ablation")),
        "packed": packed,
        "sizes": sizes,
    },
    "docs/families.md": {"families": families},
    "docs/architecture.md": {
        "runtimes": runtimes,
        "sampling": sampling,
        "batched": batched,
        "uneven": uneven,
    },
    "docs/scale.md": {
        "captions": scale_figures.captions,
        "fleets": scale_figures.fleets,
        "prediction": scale_figures.prediction,
    },
    "docs/serving.md": {"load": serving_figures.load, "peers": serving_figures.peers},
    "recipes/gemma3-270m/README.md": {"text": text_figures.text},
    "docs/images/speedup.svg": {},
}
"""The sections of each document that are written from results."""


def rewritten(name: str) -> str:
    """Return a document with its figures renewed."""
    if name == "docs/images/speedup.svg":
        return chart()
    document = (ROOT / name).read_text(encoding="utf-8")
    for section, text in DOCUMENTS[name].items():
        begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
        before, rest = document.split(begin)
        _, after = rest.split(end)
        document = f"{before}{begin}\n{text()}\n{end}{after}"
    return document


if __name__ == "__main__":
    for document in DOCUMENTS:
        (ROOT / document).write_text(rewritten(document), encoding="utf-8")
