"""fastvlm itself: ordinary decoding, prompt lookup, a draft's imitation network, and a cascade."""

from __future__ import annotations

from typing import Any

import torch
from worker_protocol import ORDINARY, Decoded, Order, serve

import fastvlm
from fastvlm.functional.messages import TokenPrompt

WAYS = {
    ORDINARY: "autoregressive",
    "prompt lookup": "prompt-lookup",
    "draft": "imitation",
    "cascade": "cascade",
}


class FastVlm:
    """See `Decoder`.

    Args:
        order: What is loaded.
        runtime: What it is decoded with: `torch` or `onnx`.
    """

    def __init__(self, order: Order, runtime: str = "torch") -> None:
        torch.set_num_threads(order.threads)
        self.vlm = fastvlm.load(
            order.model, order.draft, prefix_bytes=0, runtime=runtime, **precision(order)
        )
        self.about = f"fastvlm {fastvlm.__version__}, {computed_by(runtime)}"
        self.strategies = {way: self.vlm.strategy(WAYS[way]) for way in order.ways}

    def decode(self, prompt: list[int], max_new_tokens: int, way: str) -> Decoded:
        """See `Decoder`."""
        request = self.vlm.request(
            TokenPrompt(prompt),
            strategy=self.strategies[way],
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
        )
        self.vlm.engine.run_all([request])
        if request.error is not None:
            raise request.error
        passes = request.statistics.cycles
        return Decoded(request.output_token_ids, request.started, request.times, passes)

    @torch.inference_mode()
    def log_likelihood(self, prompt: list[int], reply: list[int]) -> float:
        """See `Decoder`."""
        decoder, inputs = self.vlm.decoder, self.vlm.request(TokenPrompt(prompt + reply)).inputs
        length = len(inputs.token_ids)
        cache = decoder.cache(1, length)
        cache.assign(0, inputs)
        x = inputs.embeddings[None].to(decoder.device, decoder.dtype)
        x = decoder.forward_layers(x, cache.positions([0], length), cache, range(decoder.depth))
        logits = decoder.head(x[:, len(prompt) - 1 : -1])[0]
        known = logits.double().log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]
        return float(known.sum())


def computed_by(runtime: str) -> str:
    """Return the library that computes, with its version."""
    if runtime == "onnx":
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"
    return f"torch {torch.__version__}"


def precision(order: Order) -> dict[str, Any]:
    """Return what loads the weights in the precision ordered."""
    if order.dtype in ("float32", "bfloat16"):
        return {"dtype": getattr(torch, order.dtype)}
    return {"dtype": torch.float32, "quantize": order.dtype}


if __name__ == "__main__":
    serve(FastVlm)
