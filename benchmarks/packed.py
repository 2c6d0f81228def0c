"""What a pass over a few positions costs, with packed weights and without.

A verify is such a pass, as wide as the draft and one more; ordinary decoding's passes are one
position wide. Two decoders are measured: that of a model, and four layers of the shape of
Qwen2-7B's, with random weights, which are enough for the cost of a layer.

Run `python benchmarks/packed.py [--model DIR] [--threads N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import fastvlm
from fastvlm.evaluation.measuring import hardware
from fastvlm.language import SplitDecoder, split_decoder
from fastvlm.language.packed import PACKED_BYTES, pack_decoder

WIDTHS = (1, 2, 3, 4, 6, 8, 11, 16, 24, 32)
CONTEXT = 90
"""Positions in the cache: a prompt and half a reply."""
ROUNDS = 15
LAYERS = 4


@dataclass(frozen=True, slots=True)
class Named:
    """A decoder, and the model that holds its weights.

    Args:
        name: What it is.
        model: The model, which its decoder does not keep alive.
        decoder: The decoder.
    """

    name: str
    model: PreTrainedModel
    decoder: SplitDecoder


def like_qwen2_7b(packed_bytes: int) -> Named:
    """Return a few layers of the shape of Qwen2-7B's, and a small LM head, with their name."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=LAYERS,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=256,
    )
    model = Qwen2ForCausalLM(config).eval()
    pack_decoder(model, packed_bytes)
    return Named(f"{LAYERS} layers like Qwen2-7B's", model, split_decoder(model))


@torch.inference_mode()
def milliseconds(
    decoders: dict[str, SplitDecoder], width: int
) -> dict[str, tuple[float, float, float]]:
    """Return the median and the quartiles of a pass of each decoder, measured in turns."""
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    caches = {name: decoder.cache(1, CONTEXT + width) for name, decoder in decoders.items()}
    tokens = torch.ones(1, width, dtype=torch.long)
    for _ in range(ROUNDS + 1):
        for name, decoder in decoders.items():
            cache = caches[name]
            started = time.perf_counter()
            x = decoder.embed(tokens)
            positions = cache.positions([CONTEXT], width)
            x = decoder.forward_layers(x, positions, cache, range(decoder.depth))
            decoder.head(x).argmax(-1).tolist()
            taken[name].append(1e3 * (time.perf_counter() - started))
    found = {}
    for name, times in taken.items():
        low, median, high = statistics.quantiles(times[1:], n=4)
        found[name] = median, low, high
    return found


def main() -> None:
    """Print a table for each decoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the model; the example model, if not given")
    parser.add_argument("--threads", type=int, help="CPU threads to compute with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    def of_the_model(packed_bytes: int) -> Named:
        vlm = fastvlm.load(options.model, runtime="torch", packed_bytes=packed_bytes)
        size = sum(parameter.numel() for parameter in vlm.model.parameters())
        return Named(f"{size / 1e6:.0f} M, {vlm.decoder.depth} layers", vlm.model, vlm.decoder)

    makers: list[Callable[[int], Named]] = [of_the_model, like_qwen2_7b]
    tables = []
    for make in makers:
        named = {"plain": make(0), "packed": make(PACKED_BYTES)}
        name = named["plain"].name
        print(f"\n{name}\n positions  plain ms  packed ms")  # noqa: T201
        decoders = {kind: one.decoder for kind, one in named.items()}
        passes: list[dict[str, object]] = []
        for width in WIDTHS:
            found = milliseconds(decoders, width)
            plain, packed = found["plain"][0], found["packed"][0]
            ratio = plain / packed
            print(f"{width:10} {plain:9.1f} {packed:10.1f}  {ratio:.2f}x")  # noqa: T201
            passes.append({"positions": width, **found})
        tables.append({"name": name, "layers": decoders["plain"].depth, "passes": passes})
    if options.json is not None:
        record = {
            "hardware": hardware(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "decoders": tables,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
