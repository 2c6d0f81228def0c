"""What a machine with a GPU shows: its tests, then identity and speed, in one run of minutes.

- `pytest tests/cuda`: the tests that need a device;
- ordinary and speculative decoding, by torch and by CUDA graphs, beside `transformers`' own
  `generate`, in float32 and bfloat16, one request at a time and eight: the example model with its
  draft, and a model of the shape of LLaVA-1.5-7B with random weights, whose later layers change
  little, so that its first layers are a good draft, as a trained one is;
- the share of the memory's speed, as measured, at which ordinary steps read their weights;
- an audit: how many replies have the tokens of `generate`, and where they differ how far apart the
  two best logits were.

For each batch every contender decodes before the next batch, in an order that turns. Without
tests, the time is limited by `--seconds`; every case has its share of what is left.

Run `python benchmarks/accelerator.py [--device cuda] [--seconds N] [--json FILE]`. Where there is
no such device it says so and exits with 2; `--device cpu --quick` goes the same way with a small
model and a few tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT / "src"))

TESTS_SECONDS = 180
"""After so many seconds the tests are stopped."""
TIES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Two best logits that lie closer than this share of the best one may change places by rounding
alone."""
LARGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = {
    **LARGE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
EXIT_LAYER = 2
LATER_LAYERS = 0.02
"""What the random model's layers after the exit layer add, as a share of what they would."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Args:
        text: The random model's decoder.
        image_size: Side in pixels of its images.
        tokens: The most tokens of a reply.
        rounds: The most batches of a case, after one that warms up.
        dtypes: The precisions.
        batches: Requests decoded together.
        drafting: Options of drafting; drafts adapt where there are none.
    """

    text: Mapping[str, Any]
    image_size: int
    tokens: int
    rounds: int
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    drafting: Mapping[str, Any]


DTYPES = (torch.float32, torch.bfloat16)
WHOLE = Scale(LARGE, 512, 100, 12, DTYPES, (1, 8), {})
QUICK = Scale(SMALL, 128, 12, 1, DTYPES, (1, 2), {"num_speculative_tokens": 3, "confidence": 0.0})


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender's replies to a batch, and what they took.

    Args:
        replies: Their tokens.
        first: Seconds to the first token of all of them, images included.
        rest: Seconds from there to the last token.
        proposed: Drafted tokens.
        accepted: Accepted ones.
        passes: Verifies that the replies took together.
    """

    replies: list[list[int]]
    first: float
    rest: float
    proposed: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds per token of all replies after their first ones."""
        later = sum(len(reply) - 1 for reply in self.replies)
        return 1e3 * self.rest / later if later else None


@dataclass(frozen=True, slots=True)
class Contest:
    """A model, what it is asked, and how.

    Args:
        name: In the record.
        vlm: The model.
        prompt: What is asked of every image, so that a batch needs no padding.
        images: Of which batches are made.
        strategies: Ours, by name, each with the model in the runtime that it decodes in.
        tokens: The most tokens of a reply.
    """

    name: str
    vlm: Any
    prompt: str
    images: Sequence[Any]
    strategies: Mapping[str, tuple[Any, Any]]
    tokens: int

    def ours(self, strategy: str, images: Sequence[Any]) -> Measured:
        """Decode a batch with one of our strategies.

        Raises:
            Exception: What a request failed with.
        """
        started = time.perf_counter()
        vlm, chosen = self.strategies[strategy]
        requests = [
            vlm.request(self.prompt, image, strategy=chosen, max_new_tokens=self.tokens)
            for image in images
        ]
        for request in vlm.engine.run(requests):
            if request.error is not None:
                raise request.error
        first = max(request.times[0] for request in requests)
        found = [request.statistics for request in requests]
        return Measured(
            [list(request.output_token_ids) for request in requests],
            first - started,
            max(request.times[-1] for request in requests) - first,
            sum(one.proposed for one in found),
            sum(one.accepted for one in found),
            sum(one.cycles for one in found),
        )

    def inputs(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return what `generate` takes for a batch."""
        from fastvlm.prompts import question

        rows = [self.vlm.prompts.inputs(question(self.prompt, image)) for image in images]
        # Token ids, masks and images alike: all prompts are equally long.
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def theirs(self, images: Sequence[Any]) -> Measured:
        """Decode a batch with `transformers`' own `generate`."""
        started = time.perf_counter()
        times: list[float] = []

        def clock(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            del scores
            input_ids[0, -1].item()  # waits for the device
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        inputs = self.inputs(images)
        out = self.vlm.model.generate(
            **inputs, max_new_tokens=self.tokens, do_sample=False, stopping_criteria=[clock]
        )
        replies = self.cut(out[:, inputs["input_ids"].shape[1] :])
        return Measured(replies, times[0] - started, times[-1] - times[0])

    def cut(self, rows: torch.Tensor) -> list[list[int]]:
        """Return replies up to their end tokens."""
        ends = self.vlm.end_tokens
        return [
            row[: 1 + next((n for n, token in enumerate(row) if token in ends), len(row))]
            for row in rows.tolist()
        ]

    def best_logits(self, images: Sequence[Any]) -> list[list[list[float]]]:
        """Return the two best logits at each token of `generate`'s replies to a batch."""
        out = self.vlm.model.generate(
            **self.inputs(images),
            max_new_tokens=self.tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack([logits.float().topk(2).values for logits in out.logits])
        return best.transpose(0, 1).tolist()


def shipped(device: torch.device, dtype: torch.dtype, scale: Scale) -> Contest:
    """Return the example model, with its draft."""
    import fastvlm
    import fastvlm_example
    from fastvlm_example import HELD_OUT_SCENES
    from fastvlm_example.scenes import render, sample

    models = [
        fastvlm.load(device=device, dtype=dtype, prefix_bytes=0, runtime=runtime)
        for runtime in runtimes(device)
    ]
    vlm = models[0]
    seeds = range(HELD_OUT_SCENES, HELD_OUT_SCENES + 16)
    images = [render(sample(seed), vlm.image_size) for seed in seeds]
    chosen = {"autoregressive": {}, "imitation": scale.drafting, "prompt-lookup": {}}
    prompt = fastvlm_example.SCENE_PROMPT
    return Contest("shipped", vlm, prompt, images, strategies(models, chosen), scale.tokens)


def random_weights(device: torch.device, dtype: torch.dtype, scale: Scale) -> Contest:
    """Return a larger model with random weights, whose first layers draft."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    from fastvlm.runtimes import RuntimeOptions, decoder_of
    from fastvlm.vision import FastViTHDConfig
    from fastvlm.vlm import VisionLanguageModel
    from fastvlm_example import SCENE_PROMPT
    from fastvlm_example.scenes import describe, render, sample
    from fastvlm_example.tokenizer import IMAGE, learn_tokenizer

    tokenizer = learn_tokenizer([SCENE_PROMPT, *(describe(sample(n)) for n in range(50))], 400)
    vision = FastViTHDConfig.variant("fastvithd", form="fused", image_size=scale.image_size)
    if scale.text is SMALL:
        vision = FastViTHDConfig(
            depths=(2, 1, 1, 2, 1), widths=(8, 16, 32, 32, 64), image_size=scale.image_size
        )
    config = FastVlmConfig(
        vision_config=vision.to_dict(),
        text_config={**scale.text, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = FastVlmForConditionalGeneration(config)
    model.to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        for layer in model.model.language_model.layers[EXIT_LAYER:]:
            layer.self_attn.o_proj.weight.mul_(LATER_LAYERS)
            layer.mlp.down_proj.weight.mul_(LATER_LAYERS)
    models = [
        VisionLanguageModel(
            model,
            tokenizer,
            prefix_bytes=0,
            decoder=decoder_of(model, None, RuntimeOptions(runtime)),
        )
        for runtime in runtimes(device)
    ]
    images = [render(sample(number), scale.image_size) for number in range(16)]
    early = {"exit_layer": EXIT_LAYER, **scale.drafting}
    own = strategies(models, {"autoregressive": {}, "early-exit": early})
    return Contest("random weights", models[0], SCENE_PROMPT, images, own, scale.tokens)


def runtimes(device: torch.device) -> list[str]:
    """Return the runtimes that are measured on a device, the plainest first."""
    return ["torch", "cuda"] if device.type == "cuda" else ["torch"]


def strategies(
    models: Sequence[Any], chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Return strategies of a model in its runtimes, by the names of both.

    Args:
        models: The model in each runtime.
        chosen: The strategies' options.
    """
    return {
        name if vlm is models[0] else f"{name}, {vlm.decoder.runtime}": (
            vlm,
            vlm.strategy(name, **options),
        )
        for vlm in models
        for name, options in chosen.items()
    }


def reading_share(contest: Contest, results: Row, batch: int) -> Row:
    """Return how much of the memory's speed ordinary steps reach, reading their weights."""
    from fastvlm.evaluation.roofline import measure_machine, weights_of

    decoder = contest.vlm.decoder
    machine = measure_machine(decoder.device, decoder.dtype)
    size = sum(weights_of(part)[1] for part in (*decoder.layers, decoder.lm_head))
    return {
        "bytes_per_second": machine.bytes_per_second,
        "weight_bytes": size,
        "shares": {
            name: size / machine.bytes_per_second / (1e-3 * batch * row["ms_per_token"]["median"])
            for name, row in results.items()
            if row["ms_per_token"] and (name.startswith("autoregressive") or name == "transformers")
        },
    }


def measure(contest: Contest, batch: int, rounds: int, deadline: float) -> Row:
    """Return a case's figures: every contender in turns, until the rounds or the time are over."""
    contenders: dict[str, Callable[[Sequence[Any]], Measured]] = {"transformers": contest.theirs}
    for strategy in contest.strategies:
        contenders[strategy] = lambda images, s=strategy: contest.ours(s, images)  # type: ignore[misc]
    names = list(contenders)
    images = cycle(contest.images)
    for contender in contenders.values():
        contender(list(islice(cycle(contest.images), batch)))
    found: dict[str, list[Measured]] = {name: [] for name in names}
    differences: dict[str, list[Row]] = {name: [] for name in contest.strategies}
    for number in range(rounds):
        shown = list(islice(images, batch))
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(contenders[name](shown))
        audit(contest, shown, {name: runs[-1] for name, runs in found.items()}, differences)
        if time.perf_counter() > deadline:
            break
    results = {name: summary(name, found, differences) for name in names}
    return {
        "batch": batch,
        "rounds": len(found["transformers"]),
        "results": results,
        "reading": reading_share(contest, results, batch),
    }


def audit(
    contest: Contest,
    images: Sequence[Any],
    runs: Mapping[str, Measured],
    differences: dict[str, list[Row]],
) -> None:
    """Note where replies differ from `generate`'s, and how close a call it was."""
    expected = runs["transformers"].replies
    best: list[list[list[float]]] | None = None
    for name, known in differences.items():
        for row, (one, other) in enumerate(zip(runs[name].replies, expected, strict=True)):
            if one == other:
                continue
            best = contest.best_logits(images) if best is None else best
            shared = min(len(one), len(other))
            position = next((n for n in range(shared) if one[n] != other[n]), shared)
            two = best[row][position] if position < len(best[row]) else None
            known.append({"row": row, "position": position, "best_logits": two})


def summary(name: str, found: Mapping[str, list[Measured]], differences: Row) -> Row:
    """Return one contender's figures: medians, quartiles, and ratios batch by batch."""
    own = found[name]

    def ratios(other: str) -> Row | None:
        pairs = [(a.ms_per_token, b.ms_per_token) for a, b in zip(found[other], own, strict=True)]
        return spread([a / b for a, b in pairs if a and b])

    row: Row = {
        "ttft_ms": spread([1e3 * run.first for run in own]),
        "ms_per_token": spread([run.ms_per_token for run in own if run.ms_per_token]),
        "tokens": sum(len(reply) for run in own for reply in run.replies),
    }
    if name == "transformers":
        return row
    proposed, passes = sum(run.proposed for run in own), sum(run.passes for run in own)
    decoded = sum(len(reply) - 1 for run in own for reply in run.replies)
    replies = sum(len(run.replies) for run in own)
    return {
        **row,
        "speedup_over_transformers": ratios("transformers"),
        "speedup_over_autoregressive": ratios("autoregressive"),
        "acceptance_rate": sum(run.accepted for run in own) / proposed if proposed else None,
        "tokens_per_pass": decoded / passes if passes else None,
        "replies": replies,
        "identical": replies - len(differences[name]),
        "differences": differences[name],
    }


def spread(values: Sequence[float]) -> Row | None:
    """Return the median and the quartiles of some values; None where there are none."""
    from fastvlm.functional.statistics import Spread

    if not values:
        return None
    found = Spread.of(values)
    return {"median": found.median, "low": found.low, "high": found.high}


def run_tests(device: torch.device, *, quick: bool) -> Row:
    """Run the tests that need a device, in a process of their own, and count them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/cuda", "-p", "no:cacheprovider"]
        command += [
            "--junitxml",
            str(report),
            *(["-k", "llama and autoregressive"] if quick else []),
        ]
        path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "FASTVLM_TEST_DEVICE": str(device)}
        started = time.perf_counter()
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=TESTS_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        found: Row = {"exit": code, "seconds": time.perf_counter() - started}
        if report.is_file():
            suite = ET.parse(report).getroot()[0]
            counts = {name: int(suite.get(name, 0)) for name in ("errors", "failures", "skipped")}
            found |= {"tests": int(suite.get("tests", 0)), **counts}
            found["failed"] = [
                f"{case.get('classname')}::{case.get('name')}"
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            ]
        return found


def different(case: Row, tie: float) -> int:
    """Return how many replies of a case differ from `generate`'s other than by a tie."""
    found = [one for row in case["results"].values() for one in row.get("differences", [])]
    # Where there are no logits, one of the replies goes on after the other's end.
    best = [one["best_logits"] for one in found]
    return sum(two is None or two[0] - two[1] >= tie * abs(two[0]) for two in best)


def report(case: Row) -> None:
    """Print the figures of one case."""
    print(f"\n{case['model']}, {case['dtype']}, batch of {case['batch']}, {case['rounds']} rounds")  # noqa: T201
    for name, row in case["results"].items():
        times = row["ms_per_token"] or {"median": 0.0, "low": 0.0, "high": 0.0}
        line = (
            f"  {name:20} TTFT {row['ttft_ms']['median']:7.1f} ms, a token"
            " {median:6.2f} ms ({low:.2f}-{high:.2f})".format(**times)
        )
        over = row.get("speedup_over_autoregressive")
        if over is not None:
            theirs = row["speedup_over_transformers"]
            line += (
                f", {over['median']:.2f}x ordinary ({over['low']:.2f}-{over['high']:.2f}),"
                f" {theirs['median']:.2f}x transformers; identical {row['identical']} of"
                f" {row['replies']}, {case['different']} beyond a tie in the case"
            )
        if row.get("acceptance_rate") is not None:
            line += (
                f"; acceptance {row['acceptance_rate']:.2f}, {row['tokens_per_pass']:.2f} a pass"
            )
        if name in case["reading"]["shares"]:
            line += f"; {case['reading']['shares'][name]:.0%} of the memory's speed"
        print(line, flush=True)  # noqa: T201


def commit() -> str | None:
    """Return the commit of this tree; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def main() -> int:
    """Test, measure, and write the record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=270.0, help="for what is measured")
    parser.add_argument("--quick", action="store_true", help="a small model and a few tokens")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device: torch.device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print(  # noqa: T201
            "There is no CUDA device here; --device cpu --quick runs the same path in short.",
            file=sys.stderr,
        )
        return 2
    scale: Scale = QUICK if options.quick else WHOLE
    # Float32 means float32: TF32's products differ by more than what decides between two tokens.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    from fastvlm.evaluation.measuring import hardware

    record: Row = {
        "hardware": hardware(),
        "device": str(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "quick": options.quick,
        "tests": None if options.no_tests else run_tests(device, quick=options.quick),
        "cases": [],
    }

    def save() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    save()
    ends = time.perf_counter() + options.seconds
    left = 2 * len(scale.dtypes) * len(scale.batches)
    for make in (shipped, random_weights):
        for dtype in scale.dtypes:
            contest = make(device, dtype, scale)
            for batch in scale.batches:
                now = time.perf_counter()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                case = measure(contest, batch, scale.rounds, now + max(0.0, ends - now) / left)
                left -= 1
                case = {
                    "model": contest.name,
                    "parameters": contest.vlm.model.num_parameters(),
                    "dtype": str(dtype).removeprefix("torch."),
                    **case,
                    "different": different(case, TIES[dtype]),
                    "peak_bytes": torch.cuda.max_memory_allocated()
                    if device.type == "cuda"
                    else None,
                }
                record["cases"].append(case)
                save()
                report(case)
            del contest
            if device.type == "cuda":
                torch.cuda.empty_cache()
    failed = record["tests"] is not None and record["tests"]["exit"] != 0
    return int(failed or any(case["different"] for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
