"""What an ordinary step, a verify and a draft step cost in torch and in ONNX Runtime.

Two decoders are measured with their drafts: that of a model, and one of the shape of SmolLM2-135M,
with random weights. Runtimes take turns, so that what else the machine does strikes them alike.

Run `python benchmarks/runtimes.py [--model DIR] [--draft DIR] [--threads N] [--json FILE]`. On a
machine that is busy, `--clock cpu --threads 1` counts the time that the CPU has computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastvlm.checkpoints import load_checkpoint
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.imitation import initialise_from
from fastvlm.evaluation.measuring import hardware
from fastvlm.example import example
from fastvlm.functional.errors import InputError
from fastvlm.functional.threads import one_thread
from fastvlm.language import SplitDecoder, split_decoder
from fastvlm.language.cache import DecoderCache
from fastvlm.language.draft_path import DraftPath
from fastvlm.runtimes import RuntimeOptions, decoder_of

RUNTIMES = {
    "torch": RuntimeOptions("torch"),
    "onnx": RuntimeOptions("onnx"),
    "onnx int8": RuntimeOptions("onnx", "int8"),
    "onnx int4": RuntimeOptions("onnx", "int4"),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CONTEXT = 128
"""Positions in the cache: a prompt and half a reply."""
ROUNDS, UNTIMED = 15, 3
VERIFIED = 6
"""Positions of a verify."""
EXIT_LAYER, DRAFT_VOCABULARY = 2, 8192
"""Of the draft of random weights."""


@dataclass(frozen=True, slots=True)
class Named:
    """A model with a draft, and what it is."""

    name: str
    model: PreTrainedModel
    network: ImitationNetwork


@dataclass(frozen=True, slots=True)
class Measured:
    """A decoder's passes, on a cache that is filled up to `CONTEXT`."""

    decoder: SplitDecoder
    network: ImitationNetwork
    cache: DecoderCache
    rows: torch.Tensor | None

    @classmethod
    def of(cls, decoder: SplitDecoder, network: ImitationNetwork) -> Measured:
        """Return the passes of a decoder and its draft."""
        vocabulary = network.draft_vocabulary
        rows = None if vocabulary is None else decoder.lm_head_rows(vocabulary)
        return cls(decoder, network, decoder.cache(1, CONTEXT + VERIFIED + 1), rows)

    def layers(self, width: int) -> None:
        """Run the whole decoder over some positions, and choose tokens."""
        decoder, exit_layer = self.decoder, self.network.config.exit_layer
        with self.threads():
            x = decoder.embed(torch.ones(1, width, dtype=torch.long))
            positions = self.cache.positions([CONTEXT], width)
            _, logits = decoder.forward_all(x, positions, self.cache, exit_layer, logits=True)
            logits.argmax(-1).tolist()

    def ordinary(self) -> None:
        """Decode a token."""
        self.layers(1)

    def verify(self) -> None:
        """Verify a draft."""
        self.layers(VERIFIED)

    def draft(self) -> None:
        """Draft a token."""
        decoder, network = self.decoder, self.network
        exit_layer = network.config.exit_layer
        path = DraftPath(exit_layer, list(network.layers), network.mlp, self.rows)
        with self.threads():
            x = decoder.embed(torch.ones(1, 1, dtype=torch.long))
            positions = self.cache.positions([CONTEXT], 1)
            _, logits = decoder.draft_step(x, positions, self.cache, path)
            logits.argmax(-1).tolist()

    def threads(self) -> AbstractContextManager[None]:
        """Have torch compute as the engine does, see `Engine`."""
        return nullcontext() if self.decoder.runtime == "torch" else one_thread()


def of_the_model(model: str | None, draft: str | None) -> Named:
    """Return a model in float32 with its draft, or with an untrained one."""
    shipped = example()
    if model is None:
        draft = str(shipped.DRAFT) if draft is None else draft
    target, _ = load_checkpoint(shipped.MODEL if model is None else model, torch.float32)
    target.eval()
    size = sum(parameter.numel() for parameter in target.parameters())
    network = untrained(target) if draft is None else load_draft(draft, target)
    return Named(f"{size / 1e6:.0f} M", target, network)


def like_smollm2() -> Named:
    """Return a model of the shape of SmolLM2-135M's decoder, with an untrained draft."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    # As checkpoints are stored, in 16 bits: torch then reads half of the bytes.
    model = LlamaForCausalLM(config).bfloat16().float().eval()
    return Named("135 M, random", model, untrained(model))


def untrained(model: PreTrainedModel) -> ImitationNetwork:
    """Return a draft of one block that starts from the model's own layer."""
    decoder = split_decoder(model)
    config = ImitationConfig(
        exit_layer=EXIT_LAYER,
        text_config=decoder.decoder.config.to_dict(),
        draft_vocabulary_size=min(DRAFT_VOCABULARY, decoder.vocabulary_size),
    )
    network = ImitationNetwork(config)
    initialise_from(network, decoder.layers)
    assert network.draft_vocabulary is not None
    network.draft_vocabulary.copy_(torch.arange(len(network.draft_vocabulary)))
    return network.implement_as(decoder.decoder.config).to(decoder.dtype).eval()


@torch.inference_mode()
def milliseconds(
    passes: dict[str, Callable[[], None]], clock: Callable[[], float]
) -> dict[str, tuple[float, float, float]]:
    """Return the median and the quartiles of each, measured in turns.

    The threads of one runtime go on spinning for a millisecond or so, and are not to be in the way
    of another's: each turn is a few calls, of which the last counts.
    """
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS):
        for name, call in passes.items():
            for _ in range(UNTIMED):
                call()
            started = clock()
            call()
            taken[name].append(1e3 * (clock() - started))
    found = {}
    for name, times in taken.items():
        low, median, high = statistics.quantiles(times, n=4)
        found[name] = median, low, high
    return found


def measured(named: Named, runtimes: Sequence[str]) -> dict[str, Measured]:
    """Return a model's decoders by their runtimes, but for those that refuse it."""
    found = {}
    for runtime in runtimes:
        try:
            decoder = decoder_of(named.model, named.network, RUNTIMES[runtime])
        except InputError as error:
            print(f"{runtime}: {error}")  # noqa: T201
            continue
        found[runtime] = Measured.of(decoder, named.network)
    return found


def main() -> None:
    """Print a table for each decoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the model; the example model, if not given")
    parser.add_argument("--draft", help="its draft; an untrained one, if not given")
    parser.add_argument("--only", choices=("model", "random"), help="measure one of the two")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="those to measure")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, help="CPU threads to compute with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[], Named]] = {
        "model": lambda: of_the_model(options.model, options.draft),
        "random": like_smollm2,
    }
    tables = []
    for kind in makers if options.only is None else [options.only]:
        named = makers[kind]()
        kinds = ("ordinary", "verify", "draft")
        print(f"\n{named.name}, ms of the {options.clock} clock")  # noqa: T201
        print(f"{'':12}" + "".join(f"{kind:>10}" for kind in kinds))  # noqa: T201
        decoders = measured(named, options.runtimes.split(","))
        found: dict[str, dict[str, object]] = {name: {} for name in decoders}
        for one in kinds:
            calls = {name: getattr(decoder, one) for name, decoder in decoders.items()}
            for name, times in milliseconds(calls, CLOCKS[options.clock]).items():
                found[name][one] = times
        for name, row in found.items():
            each = "".join(f"{row[one][0]:10.2f}" for one in kinds)  # type: ignore[index]
            print(f"{name:12}{each}")  # noqa: T201
        tables.append({"name": named.name, "runtimes": found})
    if options.json is not None:
        record = {
            "hardware": hardware(runtime="onnx"),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "clock": options.clock,
            "verify_positions": VERIFIED,
            "decoders": tables,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
