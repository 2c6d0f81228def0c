"""How long drafts should be: adaptive drafts against fixed ones, and where drafting can only lose.

Three questions, each answered interleaved in one run on the example model:

- `scenes`, `photos` and `mix`: adaptive drafts against fixed lengths, on a mix a scene, then a
  photo, with the estimates of one reply carried to the next;
- `untrained`: a draft of random weights, block and mlp, against ordinary decoding;
- `short`: whole replies of one word (a token, and another that ends the reply, which nothing
  announces), image and prefill included.

Another rule for the length can be measured beside the package's in the same run: `--rule FILE`, a
Python file with a class `AdaptiveLength`.

Every reply must have the tokens of ordinary decoding. Run `python benchmarks/draft_length.py
[--photos DIR] [--listing FILE] [--images N] [--repeats N] [--rule FILE] [--threads N]
[--only PART,...] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastvlm
import fastvlm_example
from fastvlm.data.questions import Question, images_in
from fastvlm.decoding import Request, Strategy
from fastvlm.decoding.self_speculative import SelfSpeculative
from fastvlm.drafting import DraftLength, ImitationConfig, ImitationNetwork
from fastvlm.evaluation.measuring import hardware
from fastvlm.functional.statistics import Spread
from fastvlm_example import HELD_OUT_SCENES

FIXED = (1, 2, 4, 6, 8, 10, 14, 24)
MAX_NEW_TOKENS = 160
ORDINARY, ADAPTIVE, OTHER_RULE = "ordinary", "adaptive", "other rule"
Rule = Callable[[int], DraftLength]


def run_request(
    vlm: fastvlm.VisionLanguageModel,
    strategy: Strategy,
    question: Question,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    end_token_ids: frozenset[int] | None = None,
) -> Request:
    """Return a finished request for one question.

    Args:
        vlm: The model.
        strategy: How drafts are made.
        question: What is asked.
        max_new_tokens: The most tokens of the reply.
        end_token_ids: Tokens that end it, if not the model's own.

    Raises:
        Exception: What the request failed with.
    """
    image = question.open(vlm.image_size)
    request = vlm.request(question.prompt, image, strategy=strategy, max_new_tokens=max_new_tokens)
    if end_token_ids is not None:
        request.end_token_ids = end_token_ids
    for finished in vlm.engine.run([request]):
        if finished.error is not None:
            raise finished.error
    return request


def interleaved(
    vlm: fastvlm.VisionLanguageModel,
    strategies: Mapping[str, Strategy],
    questions: Sequence[Question],
    *,
    short: bool = False,
) -> dict[str, list[Request]]:
    """Answer each question with every strategy before the next one, in an order that turns.

    Args:
        vlm: The model.
        strategies: The contenders.
        questions: What is asked.
        short: Whether replies end with their second token.

    Raises:
        SystemExit: A reply has other tokens than ordinary decoding.
    """
    names = list(strategies)
    runs: dict[str, list[Request]] = {name: [] for name in names}
    for strategy in strategies.values():
        run_request(vlm, strategy, questions[0])
    for number, question in enumerate(questions):
        turn = number % len(names)
        ends: frozenset[int] | None = None
        if short:
            known = run_request(vlm, strategies[names[0]], question, max_new_tokens=2)
            ends = frozenset(known.output_token_ids[1:])
        for name in names[turn:] + names[:turn]:
            runs[name].append(run_request(vlm, strategies[name], question, end_token_ids=ends))
        for name in names:
            if runs[name][-1].output_token_ids != runs[names[0]][-1].output_token_ids:
                raise SystemExit(f"{name} and {names[0]} differ on {question}.")
    return runs


def seconds(run: Request, *, whole: bool) -> float:
    """Return what a reply took after its first token, or from the image on."""
    found = run.statistics
    decode = (found.tpot_ms or 0.0) * (found.tokens - 1) / 1e3
    return decode + found.ttft_ms / 1e3 if whole else decode


def compared(
    runs: Mapping[str, Sequence[Request]], reference: str, *, whole: bool = False
) -> dict[str, dict[str, Any]]:
    """Return, for each contender, its time over the reference's: median of replies, and in all."""
    base = [seconds(run, whole=whole) for run in runs[reference]]
    rows = {}
    for name, own in runs.items():
        taken = [seconds(run, whole=whole) for run in own]
        ratios = Spread.of([one / other for one, other in zip(taken, base, strict=True)])
        cycles = sum(run.statistics.cycles for run in own)
        rows[name] = {
            "time": ratios.median,
            "time_iqr": [ratios.low, ratios.high],
            "time_in_all": sum(taken) / sum(base),
            "ms_per_token": 1e3 * sum(taken) / sum(run.statistics.tokens - 1 for run in own),
            "draft_length": sum(run.statistics.proposed for run in own) / max(cycles, 1),
            "acceptance_length": sum(run.statistics.tokens - 1 for run in own) / max(cycles, 1),
        }
    return rows


def report(title: str, reference: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table."""
    print(f"\n{title}; time as a share of {reference}'s (quartiles), in all, ms a token, draft,")  # noqa: T201
    print("tokens a pass", flush=True)  # noqa: T201
    for name, row in rows.items():
        low, high = row["time_iqr"]
        print(  # noqa: T201
            f"  {name:10} {row['time']:.3f} ({low:.3f}-{high:.3f})  {row['time_in_all']:.3f}"
            f"  {row['ms_per_token']:7.2f}  {row['draft_length']:5.1f}"
            f"  {row['acceptance_length']:5.2f}",
            flush=True,
        )


def untrained(vlm: fastvlm.VisionLanguageModel, kind: str) -> Strategy:
    """Return a draft of random weights, which is right about once in a vocabulary."""
    text = vlm.model.config.get_text_config().to_dict()
    torch.manual_seed(0)
    network = ImitationNetwork(ImitationConfig(kind=kind, text_config=text)).eval()
    return vlm.strategy("imitation", network=network.to(vlm.decoder.dtype))


def loaded_rule(file: Path) -> Rule:
    """Return the class `AdaptiveLength` of a file, which may import files beside it."""
    spec = importlib.util.spec_from_file_location("other_rule", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(file.parent))
    spec.loader.exec_module(module)
    rule: Rule = module.AdaptiveLength
    return rule


def with_rule(strategies: Mapping[str, Strategy], rule: Rule | None) -> dict[str, Strategy]:
    """Return strategies, and beside each that drafts one that does so by another rule."""
    both = dict(strategies)
    for name, strategy in strategies.items():
        if rule is not None and isinstance(strategy, SelfSpeculative):
            # The network is shared, and nothing that is learnt.
            other = replace(strategy, length=rule(strategy.max_draft_tokens))
            both[OTHER_RULE if name == ADAPTIVE else f"{name}, {OTHER_RULE}"] = other
    return both


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=fastvlm_example.IMAGES)
    parser.add_argument("--listing", type=Path, help="names of the photos to take")
    parser.add_argument("--images", type=int, default=20, help="images of each kind")
    parser.add_argument("--repeats", type=int, default=1, help="of every question")
    parser.add_argument("--rule", type=Path, help="another rule's file, to measure beside this one")
    parser.add_argument("--fixed", default=",".join(map(str, FIXED)), help="fixed lengths")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="scenes,photos,mix,untrained,short")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rule = None if options.rule is None else loaded_rule(options.rule)
    lengths = [int(length) for length in options.fixed.split(",") if length]
    vlm = fastvlm.load(prefix_bytes=0)
    if options.listing is None:
        paths = [p for p in images_in(options.photos) if p.suffix == ".jpg"]
    else:
        paths = [options.photos / name for name in options.listing.read_text().split()]
    seeds = range(HELD_OUT_SCENES, HELD_OUT_SCENES + options.images)
    scenes = [Question(fastvlm_example.SCENE_PROMPT, seed) for seed in seeds]
    asked = fastvlm_example.DESCRIPTION_PROMPT
    photos = [Question(asked, str(path)) for path in paths[: options.images]]
    mix = [q for pair in zip(scenes, photos, strict=False) for q in pair] * options.repeats
    scenes, photos = scenes * options.repeats, photos * options.repeats
    out: dict[str, Any] = {
        "hardware": hardware(),
        "images": options.images,
        "repeats": options.repeats,
    }
    wanted = options.only.split(",")

    def measured(title: str, reference: str, rows: dict[str, dict[str, Any]]) -> None:
        report(title, reference, rows)
        out[title] = {"reference": reference, "results": rows}
        if options.json is not None:
            options.json.write_text(json.dumps(out, indent=1) + "\n")

    for title, questions in (("scenes", scenes), ("photos", photos), ("mix", mix)):
        if title in wanted:
            fixed = {
                f"fixed {g}": vlm.strategy("imitation", num_speculative_tokens=g, confidence=0)
                for g in lengths
            }
            adaptive = with_rule({ADAPTIVE: vlm.strategy("imitation")}, rule)
            ordinary = {ORDINARY: vlm.strategy("autoregressive")}
            runs = interleaved(vlm, {**ordinary, **adaptive, **fixed}, questions)
            measured(title, ADAPTIVE, compared(runs, ADAPTIVE))
    if "untrained" in wanted:
        strategies = {
            ORDINARY: vlm.strategy("autoregressive"),
            "block": untrained(vlm, "block"),
            "mlp": untrained(vlm, "mlp"),
        }
        runs = interleaved(vlm, with_rule(strategies, rule), mix[: 2 * options.images])
        measured("untrained drafts", ORDINARY, compared(runs, ORDINARY))
    if "short" in wanted:
        # What was learnt from longer replies must not help here.
        vlm = fastvlm.load(prefix_bytes=0)
        strategies = {ORDINARY: vlm.strategy("autoregressive"), ADAPTIVE: vlm.strategy("imitation")}
        runs = interleaved(vlm, with_rule(strategies, rule), mix, short=True)
        measured("one-word answers", ORDINARY, compared(runs, ORDINARY, whole=True))


if __name__ == "__main__":
    main()
