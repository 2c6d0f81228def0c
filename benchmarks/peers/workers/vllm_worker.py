"""vLLM."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "NUMBA_NUM_THREADS": "1",
}

import torch
import vllm
from vllm import LLM, SamplingParams, TokensPrompt
from worker_protocol import (
    ORDINARY,
    PROMPT_LOOKUP_NGRAM,
    PROMPT_LOOKUP_TOKENS,
    Decoded,
    Order,
    serve,
)

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "compressed-tensors"},
    "int4": {"dtype": "bfloat16", "quantization": "awq"},
}
"""Linear layers in whole numbers it reads from checkpoints that other tools wrote. Its own
`int8_per_channel_weight_only` quantises the experts of a mixture alone, and would measure bfloat16
under another name."""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": PROMPT_LOOKUP_TOKENS,
    "prompt_lookup_max": PROMPT_LOOKUP_NGRAM,
    "prompt_lookup_min": 1,
}


class VLLM:
    """See `Decoder`."""

    def __init__(self, order: Order) -> None:
        [way] = order.ways
        torch.set_num_threads(order.threads)
        self.about = f"vLLM {vllm.__version__}, torch {torch.__version__}"
        self.engine = LLM(
            order.model,
            max_model_len=order.context,
            max_num_seqs=1,
            enable_prefix_caching=False,
            speculative_config=None if way == ORDINARY else NGRAM,
            disable_log_stats=True,
            **PRECISIONS[order.dtype],
        )

    def decode(self, prompt: list[int], max_new_tokens: int, way: str) -> Decoded:
        """See `Decoder`."""
        del way  # that of its order
        params = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False
        )
        engine: Any = self.engine.llm_engine
        tokens: list[int] = []
        times: list[float] = []
        started = time.perf_counter()
        engine.add_request("one", TokensPrompt(prompt_token_ids=prompt), params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                times += [time.perf_counter()] * (len(tokens) - len(times))
        return Decoded(tokens, started, times)

    def log_likelihood(self, prompt: list[int], reply: list[int]) -> float:
        """See `Decoder`."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        asked = TokensPrompt(prompt_token_ids=prompt + reply)
        [output] = self.engine.generate(asked, params, use_tqdm=False)
        found = output.prompt_logprobs[len(prompt) :]
        return sum(own[token].logprob for own, token in zip(found, reply, strict=True))


if __name__ == "__main__":
    serve(VLLM)
