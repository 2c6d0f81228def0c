"""transformers: eager, with prompt lookup, and compiled with a static cache."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer
from worker_protocol import (
    ORDINARY,
    PROMPT_LOOKUP_NGRAM,
    PROMPT_LOOKUP_TOKENS,
    Decoded,
    Order,
    serve,
)

COMPILED = "compiled"
WAYS: dict[str, dict[str, Any]] = {
    ORDINARY: {},
    "prompt lookup": {
        "prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS,
        "max_matching_ngram_size": PROMPT_LOOKUP_NGRAM,
    },
    COMPILED: {"disable_compile": True},
}
"""What each way gives `generate`, which compiles by itself on accelerators alone."""


class Times(BaseStreamer):
    """Notes when each token is known."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Note the tokens of one pass; the first that come are the prompt's."""
        if not self.prompt:
            self.times += [time.perf_counter()] * value.numel()
        self.prompt = False

    def end(self) -> None:
        """Do nothing."""


class Transformers:
    """See `Decoder`."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(order.model, **precision(order))
        self.model.eval()
        # End tokens are as good as any other; suppressing them would give other replies.
        self.model.generation_config.eos_token_id = None
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.eager = self.model.forward
        if COMPILED in order.ways:
            self.cache = StaticCache(self.model.config, max_cache_len=order.context)
            self.compiled = torch.compile(self.model.forward, dynamic=False)

    def _compiled(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """Run a step compiled, and a prompt, whose length is always another, as it is."""
        forward = self.compiled if input_ids.shape[1] == 1 else self.eager
        return forward(input_ids=input_ids, **options)

    @torch.inference_mode()
    def decode(self, prompt: list[int], max_new_tokens: int, way: str) -> Decoded:
        """See `Decoder`."""
        options = dict(WAYS[way])
        self.model.forward = self.eager
        if way == COMPILED:
            self.cache.reset()
            self.model.forward = self._compiled
            options["past_key_values"] = self.cache
        tokens = torch.tensor([prompt])
        streamer, started = Times(), time.perf_counter()
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            pad_token_id=0,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            **options,
        )
        return Decoded(out[0, len(prompt) :].tolist(), started, streamer.times)

    @torch.inference_mode()
    def log_likelihood(self, prompt: list[int], reply: list[int]) -> float:
        """See `Decoder`."""
        self.model.forward = self.eager
        logits = self.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        known = logits.double().log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]
        return float(known.sum())


def precision(order: Order) -> dict[str, Any]:
    """Return what loads the weights in the precision ordered."""
    if order.dtype in ("float32", "bfloat16"):
        return {"dtype": getattr(torch, order.dtype)}
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if order.dtype == "int8" else Int4WeightOnlyConfig
    config = transformers.TorchAoConfig(kind())
    return {"dtype": torch.bfloat16, "quantization_config": config}


if __name__ == "__main__":
    serve(Transformers)
