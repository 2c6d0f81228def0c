"""fastvlm itself: ordinary decoding, prompt lookup, and a draft's imitation network."""

from __future__ import annotations

import torch
from worker_protocol import ORDINARY, Decoded, Order, serve

import fastvlm
from fastvlm.functional.messages import TokenPrompt

WAYS = {ORDINARY: "autoregressive", "prompt lookup": "prompt-lookup", "draft": "imitation"}


class FastVlm:
    """See `Decoder`."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self.vlm = fastvlm.load(order.model, order.draft, prefix_bytes=0, **precision(order))
        self.about = f"fastvlm {fastvlm.__version__}, torch {torch.__version__}"
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
        logits = self.vlm.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        known = logits.double().log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]
        return float(known.sum())


def precision(order: Order) -> dict[str, torch.dtype]:
    """Return what loads the weights in the precision ordered.

    Raises:
        ValueError: There is none such.
    """
    if order.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"fastvlm has no {order.dtype} weights.")
    return {"dtype": getattr(torch, order.dtype)}


if __name__ == "__main__":
    serve(FastVlm)
