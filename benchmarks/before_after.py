"""Two source trees of fastvlm compared in one run, interleaved, on the example model.

One worker process per tree answers the same questions, case by case, in an order that alternates,
and only one of the two computes at a time: a machine whose speed drifts treats both alike.

- `single`: one request at a time, greedy, with and without drafts; the tokens of both trees must be
  equal;
- `batch`: eight requests at a time;
- `uneven`: 96 requests whose `max_new_tokens` differ by a factor of four, at most eight at a time.
  A tree without an engine decodes twelve batches one after another;
- `sampled`: drawn replies with two drafts, adaptive and of fixed length. What is drawn may differ
  between the trees, so what is compared is acceptance and time.

Ratios are the time before over the time after (for a throughput: after over before), so that above
1 the second tree is faster.

Run `python benchmarks/before_after.py --before SRC --after SRC [--threads N] [--limit N]
[--photos DIR [--listing FILE]] [--cases CASE,...] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TextIO

SLOTS = 8
"""Requests decoded together in the cases `batch` and `uneven`."""
UNEVEN_LIMITS = (20, 40, 60, 80)
"""`max_new_tokens` of the uneven requests, in turn; descriptions of scenes are longer than all."""
UNEVEN_REQUESTS = 96
MAX_NEW_TOKENS = 160
TEMPERATURES = (0.7, 1.0)
FIXED_DRAFT = 4
"""Tokens of drafts of fixed length, where acceptance does not depend on the length chosen."""
GREEDY_STRATEGIES = ("autoregressive", "imitation")
SAMPLED_STRATEGIES = ("imitation", "imitation-mlp")
TREES = ("before", "after")
CASES = ("single", "batch", "uneven", "sampled")

Answer = dict[str, Any]
"""What a worker reports of one job."""


# The worker: one tree's model.


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that are decoded together, by one strategy.

    Args:
        prompt: What is asked of each image.
        images: Files, one for each request.
        strategy: The strategy by its name after the change.
        limits: `max_new_tokens` of each request.
        sampling: Options of sampling; empty for greedy decoding.
        drafting: Options of drafting.
        together: The most requests decoded together.
    """

    prompt: str
    images: list[str]
    strategy: str
    limits: list[int]
    sampling: dict[str, Any]
    drafting: dict[str, Any]
    together: int = 1


def loaded() -> Any:
    """Return the example model, without a prefix cache and with as many slots as are needed."""
    import fastvlm

    options: dict[str, Any] = {"prefix_bytes": 0}
    if "max_slots" in inspect.signature(fastvlm.load).parameters:
        options["max_slots"] = SLOTS
    vlm = fastvlm.load(**options)
    if hasattr(vlm, "engine") and getattr(vlm.engine, "max_slots", SLOTS) != SLOTS:
        vlm.engine.max_slots = SLOTS
    return vlm


@cache
def draft_of_kind_mlp(vlm: Any) -> Any:
    """Return the shipped draft of the other kind."""
    import fastvlm_example
    from fastvlm.drafting.directory import load_draft

    return load_draft(fastvlm_example.DRAFT_MLP, vlm.model)


def decode(vlm: Any, job: Job) -> tuple[list[Any], list[list[int]], float, float]:
    """Return a job's finished requests, their tokens, and the seconds of prompts and decoding."""
    network = draft_of_kind_mlp(vlm) if job.strategy == "imitation-mlp" else None
    name = "imitation" if network is not None else job.strategy
    strategy = vlm.strategy(name, network=network, **job.drafting)
    started = time.perf_counter()
    requests = [
        vlm.request(job.prompt, image, strategy=strategy, max_new_tokens=limit, **job.sampling)
        for image, limit in zip(job.images, job.limits, strict=True)
    ]
    prepared = time.perf_counter()
    for request in vlm.engine.run(requests):
        if request.error is not None:
            raise request.error
    ended = time.perf_counter()
    replies = [list(request.output_token_ids) for request in requests]
    return requests, replies, prepared - started, ended - prepared


def decode_without_engine(vlm: Any, job: Job) -> tuple[list[Any], list[list[int]], float, float]:
    """Do what `decode` does in a tree before the engine; to be dropped with such trees."""
    from fastvlm.decoding import Decoding

    network = draft_of_kind_mlp(vlm) if job.strategy == "imitation-mlp" else None
    name = "imitation" if network is not None else job.strategy
    drafter = vlm.drafter(name, network=network, **job.drafting)
    started = time.perf_counter()
    requests = [
        vlm.request(job.prompt, image, max_new_tokens=limit, **job.sampling)
        for image, limit in zip(job.images, job.limits, strict=True)
    ]
    prepared = time.perf_counter()
    for first in range(0, len(requests), job.together):
        for _ in Decoding(vlm.decoder, drafter, requests[first : first + job.together]):
            pass
    ended = time.perf_counter()
    replies = [list(request.reply) for request in requests]
    return requests, replies, prepared - started, ended - prepared


def answer(vlm: Any, job: Job) -> Answer:
    """Run a job and return what it took, in seconds, and what came of it."""
    run = decode if hasattr(vlm, "engine") else decode_without_engine
    requests, replies, preparing, decoding = run(vlm, job)
    all_started = max(request.times[0] for request in requests)
    later = [known for request in requests for known in request.times if known > all_started]
    return {
        "preparing": preparing,
        "decoding": decoding,
        # What follows when every request has its first token; in a batch alone.
        "tokens_after_first": len(later),
        "after_first": max(later) - all_started if later else 0.0,
        "replies": [
            {
                "first_token": found.ttft_ms / 1e3,
                "per_token": None if found.tpot_ms is None else found.tpot_ms / 1e3,
                "token_ids": tokens,
                "proposed": found.proposed,
                "accepted": found.accepted,
                "cycles": found.cycles,
            }
            for found, tokens in zip((r.statistics for r in requests), replies, strict=True)
        ],
    }


def describe_machine() -> Answer:
    """Return what a worker computes on, and the instructions that its torch uses."""
    import torch

    from fastvlm.evaluation.measuring import hardware

    return {**hardware(), "torch_uses": torch.backends.cpu.get_cpu_capability()}


def describe_tree(vlm: Any) -> Answer:
    """Return what a worker's tree is, and the prompts that the model was trained on."""
    import fastvlm
    import fastvlm_example

    return {
        "source": str(Path(fastvlm.__file__).parents[1]),
        "engine": hasattr(vlm, "engine"),
        "prompts": {
            "scenes": fastvlm_example.SCENE_PROMPT,
            "photos": fastvlm_example.DESCRIPTION_PROMPT,
        },
        "images": [str(path) for path in sorted(fastvlm_example.IMAGES.glob("*.jpg"))],
    }


def render_scenes(vlm: Any, folder: str, number: int) -> list[str]:
    """Render held-out scenes into a folder, and return their files."""
    from fastvlm_example import HELD_OUT_SCENES
    from fastvlm_example.scenes import render, sample

    files = [Path(folder) / f"scene-{index}.png" for index in range(number)]
    for index, file in enumerate(files):
        render(sample(HELD_OUT_SCENES + index), vlm.image_size).save(file)
    return [str(file) for file in files]


def work(threads: int) -> None:
    """Answer the jobs that come in, a line of JSON each, until there are no more."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    vlm = loaded()
    actions: dict[str, Callable[..., Any]] = {
        "describe": lambda: describe_tree(vlm),
        "machine": describe_machine,
        "render": lambda folder, number: render_scenes(vlm, folder, number),
        "job": lambda **fields: answer(vlm, Job(**fields)),
    }
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = {"result": actions[asked["action"]](**asked["arguments"])}
        except Exception:  # noqa: BLE001 - the process that asked reports it
            found = {"failure": traceback.format_exc()}
        print(json.dumps(found), file=answers, flush=True)


# The other process: what is asked of the workers, and what their answers say.


class Worker:
    """A process that holds one tree's model.

    Args:
        name: Which of the two trees.
        tree: A checkout, or its `src`.
        threads: CPU threads to compute with.

    Raises:
        SystemExit: There is no fastvlm in the tree, or the worker imports another one.
    """

    def __init__(self, name: str, tree: Path, threads: int) -> None:
        self.name = name
        tree = tree.resolve()
        self.source = tree if (tree / "fastvlm").is_dir() else tree / "src"
        if not (self.source / "fastvlm").is_dir():
            raise SystemExit(f"There is no fastvlm in {tree} or in its src.")
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.source),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self.about: Answer = self.ask("describe")
        if Path(self.about["source"]) != self.source:
            raise SystemExit(f"The worker for {self.source} imported {self.about['source']}.")

    def ask(self, action: str, **arguments: Any) -> Any:
        """Return the answer to one action, which is waited for.

        Raises:
            SystemExit: The worker failed.
        """
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        print(json.dumps({"action": action, "arguments": arguments}), file=pipe_in, flush=True)
        line = pipe_out.readline()
        if not line:
            raise SystemExit(f"The worker {self.name} ended with {self.process.wait()}.")
        found = json.loads(line)
        if "failure" in found:
            raise SystemExit(f"The worker {self.name} failed at {arguments}:\n{found['failure']}")
        return found["result"]

    def close(self) -> None:
        """Let the worker end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


Pair = dict[str, Answer]
"""The answers of both trees to one job."""


def interleaved(workers: Sequence[Worker], jobs: Sequence[Job]) -> list[Pair]:
    """Return both workers' answers to each job, the first to answer alternating."""
    pairs = []
    for worker in workers:
        worker.ask("job", **asdict(jobs[0]))
    for number, job in enumerate(jobs):
        order = workers if number % 2 else workers[::-1]
        pairs.append({worker.name: worker.ask("job", **asdict(job)) for worker in order})
    return pairs


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median and the quartiles of some values; None where there are none."""
    if not values:
        return None
    low = median = high = values[0]
    if len(values) > 1:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "number": len(values)}


def compared(pairs: Sequence[Pair], measure: Callable[[Answer], float | None]) -> Answer:
    """Return each tree's spread of a time and the spread of its ratio, job by job."""
    found = [{name: measure(pair[name]) for name in TREES} for pair in pairs]
    known = [row for row in found if None not in row.values()]
    ratios = [row["before"] / row["after"] for row in known]  # type: ignore[operator]
    return {
        **{name: spread([row[name] for row in known]) for name in TREES},  # type: ignore[misc]
        "ratio": spread(ratios),
    }


def tokens(pair_side: Answer) -> list[list[int]]:
    """Return the tokens of a job's replies."""
    return [reply["token_ids"] for reply in pair_side["replies"]]


def differences(pairs: Sequence[Pair]) -> list[dict[str, int]]:
    """Return where the trees' replies differ: the job, the reply in it, the first such token."""
    return [
        {"job": job, "reply": index, "position": first_difference(one, other)}
        for job, pair in enumerate(pairs)
        for index, (one, other) in enumerate(
            zip(tokens(pair["before"]), tokens(pair["after"]), strict=True)
        )
        if one != other
    ]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the first position at which two replies differ, one's end included."""
    shared = min(len(one), len(other))
    return next((n for n in range(shared) if one[n] != other[n]), shared)


def drafts(pairs: Sequence[Pair]) -> Answer:
    """Return what each tree's drafts were worth over all replies, long ones counting for more."""
    rows = {}
    for name in TREES:
        replies = [reply for pair in pairs for reply in pair[name]["replies"]]
        totals = {
            part: sum(reply[part] for reply in replies)
            for part in ("proposed", "accepted", "cycles")
        }
        decoded = sum(len(reply["token_ids"]) - 1 for reply in replies)
        rows[name] = {
            "tokens": decoded + len(replies),
            "acceptance_rate": totals["accepted"] / max(totals["proposed"], 1),
            "tokens_per_pass": decoded / max(totals["cycles"], 1),
            "draft_length": totals["proposed"] / max(totals["cycles"], 1),
        }
    return rows


def only(side: Answer) -> Answer:
    """Return the one reply of a job."""
    [reply] = side["replies"]
    return reply


def single_requests(pairs: Sequence[Pair]) -> Answer:
    """Return the times of jobs of one request, in milliseconds."""

    def milliseconds(part: str) -> Callable[[Answer], float | None]:
        return lambda side: None if only(side)[part] is None else 1e3 * only(side)[part]

    return {
        "jobs": len(pairs),
        "ttft_ms": compared(pairs, milliseconds("first_token")),
        "ms_per_token": compared(pairs, milliseconds("per_token")),
        "drafts": drafts(pairs),
    }


def many_requests(pairs: Sequence[Pair], *, one_batch: bool) -> Answer:
    """Return the throughput of jobs of several requests, as milliseconds a token of all of them.

    Args:
        pairs: The answers.
        one_batch: Whether all requests of a job are decoded together, so that there is a time when
            all have their first token.
    """

    def per_token(side: Answer, seconds: float) -> float:
        return 1e3 * seconds / sum(map(len, tokens(side)))

    def after_first(side: Answer) -> float | None:
        count = side["tokens_after_first"]
        return 1e3 * side["after_first"] / count if count else None

    measures: dict[str, Callable[[Answer], float | None]] = {
        "decoding": lambda side: per_token(side, side["decoding"]),
        "in_all": lambda side: per_token(side, side["preparing"] + side["decoding"]),
    }
    if one_batch:
        measures["after_first_tokens"] = after_first
    found = {name: compared(pairs, measure) for name, measure in measures.items()}
    return {
        "jobs": len(pairs),
        "ms_per_token": found,
        "tokens_per_second": {
            name: {tree: row[tree] and 1e3 / row[tree]["median"] for tree in TREES}
            for name, row in found.items()
        },
        "drafts": drafts(pairs),
    }


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked.

    Args:
        prompts: The prompt of each kind of image.
        images: The files of each kind, as many as were asked for.
        scenes: More files of scenes, for the uneven requests.
    """

    prompts: dict[str, str]
    images: dict[str, list[str]]
    scenes: list[str]

    def batches(self, number: int) -> Iterator[tuple[str, list[str]]]:
        """Yield the prompt and the images of some batches, scenes and photos in turn."""
        files = {kind: cycle(found) for kind, found in self.images.items()}
        for kind in islice(cycle(self.images), number):
            yield self.prompts[kind], list(islice(files[kind], SLOTS))


def greedy(prompt: str, images: list[str], strategy: str) -> Job:
    """Return a job of greedy decoding, all its images together."""
    limits = [MAX_NEW_TOKENS] * len(images)
    return Job(prompt, images, strategy, limits, {}, {}, together=len(images))


def measure_single(workers: Sequence[Worker], asked: Questions) -> Iterator[tuple[str, Answer]]:
    """Yield the results of one request at a time."""
    for kind, images in asked.images.items():
        found = {}
        for strategy in GREEDY_STRATEGIES:
            jobs = [greedy(asked.prompts[kind], [image], strategy) for image in images]
            found[strategy] = interleaved(workers, jobs)
            row = {**single_requests(found[strategy]), "different": differences(found[strategy])}
            if strategy != GREEDY_STRATEGIES[0]:
                row["other_than_without_drafts"] = {
                    tree: sum(
                        tokens(one[tree]) != tokens(other[tree])
                        for one, other in zip(*found.values(), strict=True)
                    )
                    for tree in TREES
                }
            yield f"single, {kind}, {strategy}", row


def measure_batch(workers: Sequence[Worker], asked: Questions) -> Iterator[tuple[str, Answer]]:
    """Yield the results of eight requests at a time, and how many replies differ from singles'."""
    batches = list(asked.batches(max(4, 2 * len(asked.scenes) // UNEVEN_REQUESTS)))
    alone = {
        (prompt, image): tokens(
            workers[0].ask("job", **asdict(greedy(prompt, [image], "autoregressive")))
        )[0]
        for prompt, images in batches
        for image in dict.fromkeys(images)
    }
    for strategy in GREEDY_STRATEGIES:
        pairs = interleaved(workers, [greedy(*batch, strategy) for batch in batches])
        other = {
            tree: sum(
                reply != alone[prompt, image]
                for (prompt, images), pair in zip(batches, pairs, strict=True)
                for image, reply in zip(images, tokens(pair[tree]), strict=True)
            )
            for tree in TREES
        }
        row = {
            **many_requests(pairs, one_batch=True),
            "different": differences(pairs),
            "other_than_alone": other,
        }
        yield f"batch of {SLOTS}, {strategy}", row


def measure_uneven(workers: Sequence[Worker], asked: Questions) -> Iterator[tuple[str, Answer]]:
    """Yield the results of requests of different length."""
    limits = list(islice(cycle(UNEVEN_LIMITS), UNEVEN_REQUESTS))
    parts = range(0, len(asked.scenes), UNEVEN_REQUESTS)
    for strategy in GREEDY_STRATEGIES:
        jobs = [
            Job(
                asked.prompts["scenes"],
                asked.scenes[start : start + UNEVEN_REQUESTS],
                strategy,
                limits,
                {},
                {},
                together=SLOTS,
            )
            for start in parts
        ]
        pairs = interleaved(workers, jobs)
        yield (
            f"uneven, {UNEVEN_REQUESTS} requests, {strategy}",
            {**many_requests(pairs, one_batch=False), "different": differences(pairs)},
        )


def measure_sampled(workers: Sequence[Worker], asked: Questions) -> Iterator[tuple[str, Answer]]:
    """Yield the results of drawn replies, one request at a time."""
    lengths: dict[str, dict[str, Any]] = {
        "adaptive": {},
        f"drafts of {FIXED_DRAFT}": {"num_speculative_tokens": FIXED_DRAFT, "confidence": 0.0},
    }
    for kind, images in asked.images.items():
        for strategy in SAMPLED_STRATEGIES:
            for temperature in TEMPERATURES:
                for name, drafting in lengths.items():
                    jobs = [
                        Job(
                            asked.prompts[kind],
                            [image],
                            strategy,
                            [MAX_NEW_TOKENS],
                            {"temperature": temperature, "seed": seed},
                            drafting,
                        )
                        for seed, image in enumerate(images)
                    ]
                    pairs = interleaved(workers, jobs)
                    title = f"sampled at {temperature}, {kind}, {strategy}, {name}"
                    yield title, single_requests(pairs)


MEASURES = dict(
    zip(CASES, (measure_single, measure_batch, measure_uneven, measure_sampled), strict=True)
)


def cell(found: Mapping[str, float], *, throughput: bool = False) -> str:
    """Return a median and its quartiles as text; those of a throughput, if so wanted."""
    median, low, high = (found[name] for name in ("median", "low", "high"))
    if throughput:
        median, low, high = 1e3 / median, 1e3 / high, 1e3 / low
    return f"{median:9.2f} ({low:.2f}-{high:.2f})"


def report(title: str, row: Mapping[str, Any], to: TextIO) -> None:
    """Print the figures of one case."""

    def times(name: str, found: Mapping[str, Any], *, throughput: bool = False) -> None:
        if found["ratio"] is None:
            return
        cells = [cell(found[tree], throughput=throughput) for tree in TREES]
        ratio = "{median:.3f}x ({low:.3f}-{high:.3f})".format(**found["ratio"])
        print(f"  {name:28} {cells[0]:>28} {cells[1]:>28}   {ratio}", file=to)

    print(f"\n{title} ({row['jobs']} jobs)", file=to)
    if "ttft_ms" in row:
        times("ms to the first token", row["ttft_ms"])
        times("ms per output token", row["ms_per_token"])
    else:
        for name, found in row["ms_per_token"].items():
            times(f"tokens/s, {name.replace('_', ' ')}", found, throughput=True)
    before, after = (row["drafts"][tree] for tree in TREES)
    if before["draft_length"] or after["draft_length"]:
        for name in ("acceptance_rate", "tokens_per_pass", "draft_length"):
            label = name.replace("_", " ")
            print(f"  {label:28} {before[name]:28.3f} {after[name]:28.3f}", file=to)
    if "different" in row:
        print(f"  replies with other tokens: {len(row['different'])}", file=to)
    for name, label in (
        ("other_than_without_drafts", "other tokens than without drafts"),
        ("other_than_alone", "other tokens in a batch than alone"),
    ):
        if name in row:
            counts = ", ".join(f"{tree} {row[name][tree]}" for tree in TREES)
            print(f"  {label}: {counts}", file=to)
    to.flush()


def instructions() -> str:
    """Return the widest vector instructions of this CPU, by its flags."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    names = {
        "amx_bf16": "AMX with bfloat16",
        "avx512_bf16": "AVX-512 with bfloat16",
        "avx512f": "AVX-512",
        "avx2": "AVX2",
    }
    return next((name for flag, name in names.items() if flag in flags), "unknown")


def commit_of(tree: Path) -> str | None:
    """Return a tree's commit, marked where files of it have changed; None outside of git."""
    found = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def photos_in(folder: Path | None, listing: Path | None, embedded: list[str]) -> list[str]:
    """Return the photos to ask about, in the listing's order; the embedded ones by default.

    Raises:
        SystemExit: There are none.
    """
    if folder is None:
        return embedded
    names = listing.read_text().split() if listing else sorted(p.name for p in folder.glob("*.jpg"))
    folders = [folder, folder / "images"]
    found = [path for name in names for path in (at / name for at in folders) if path.is_file()]
    if not found:
        raise SystemExit(f"There are no photos in {folder}.")
    return [str(path.resolve()) for path in found]


def options_of() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout, or its src")
    parser.add_argument("--after", type=Path, help="another one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=20, help="images of each kind")
    parser.add_argument("--photos", type=Path, help="folder of photos")
    parser.add_argument("--listing", type=Path, help="names of the photos to take")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker and (options.before is None or options.after is None):
        parser.error("--before and --after name the two trees.")
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"The cases are {', '.join(CASES)}; got {', '.join(sorted(unknown))}.")
    return options


def main() -> None:
    """Compare the trees, or be one of the workers."""
    options = options_of()
    if options.worker:
        work(options.threads)
        return
    workers = [Worker(name, getattr(options, name), options.threads) for name in TREES]
    about = workers[-1].about
    record: dict[str, Any] = {
        "hardware": {**workers[0].ask("machine"), "instructions": instructions()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "trees": {
            worker.name: {"commit": commit_of(worker.source), "engine": worker.about["engine"]}
            for worker in workers
        },
        "limit": options.limit,
        "load_average": {"at_start": os.getloadavg()},
        "cases": {},
    }
    machine = record["hardware"]
    print(  # noqa: T201
        f"{machine['processor']} ({machine['instructions']}), {machine['threads']} of"
        f" {machine['cores']} threads, torch {machine['torch']}, transformers"
        f" {machine['transformers']}\nbefore: {record['trees']['before']['commit']}, after:"
        f" {record['trees']['after']['commit']}\nMedians (quartiles) before and after; the ratio is"
        " above 1 where the second is faster.",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounds = max(2, -(-options.limit // UNEVEN_REQUESTS))
        scenes = workers[0].ask("render", folder=folder, number=rounds * UNEVEN_REQUESTS)
        shown = photos_in(options.photos, options.listing, about["images"])
        images = {"scenes": scenes[: options.limit], "photos": shown[: options.limit]}
        asked = Questions(about["prompts"], images, scenes)
        for case in options.cases:
            for title, row in MEASURES[case](workers, asked):
                record["cases"][title] = row
                report(title, row, sys.stdout)
                if options.json is not None:
                    record["load_average"]["at_end"] = os.getloadavg()
                    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
