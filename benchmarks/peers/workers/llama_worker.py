"""llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from worker_protocol import (
    ORDINARY,
    PROMPT_LOOKUP_NGRAM,
    PROMPT_LOOKUP_TOKENS,
    Decoded,
    Order,
    serve,
)

CONVERTED = {"float32": "f32", "bfloat16": "bf16"}
"""The formats that llama.cpp's script writes."""
QUANTISED = {
    "int8": ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
    "int4": ("Q4_K_M", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M),
}
"""The formats that are made from float32."""
GGML_F32, GGML_F16 = 0, 1


class LlamaCpp:
    """See `Decoder`."""

    def __init__(self, order: Order) -> None:
        [way] = order.ways
        file, kind = written(order)
        system = llama_cpp.llama_print_system_info().decode()
        self.about = f"llama-cpp-python {llama_cpp.__version__}, {kind}, {system}"
        cache = GGML_F32 if order.dtype == "float32" else GGML_F16
        self.file, self.settings = file, {
            "n_ctx": order.context,
            "n_batch": order.context,
            "n_ubatch": order.context,
            "n_threads": order.threads,
            "n_threads_batch": order.threads,
            "type_k": cache,
            "type_v": cache,
            "verbose": False,
        }  # fmt: skip
        lookup = None
        if way != ORDINARY:
            lookup = LlamaPromptLookupDecoding(PROMPT_LOOKUP_NGRAM, PROMPT_LOOKUP_TOKENS)
        self.llama = llama_cpp.Llama(str(file), draft_model=lookup, **self.settings)

    def decode(self, prompt: list[int], max_new_tokens: int, way: str) -> Decoded:
        """See `Decoder`."""
        del way  # that of its order
        self.llama.reset()  # else it reuses what it knows of the last prompt
        tokens, times, started = [], [], time.perf_counter()
        for token in self.llama.generate(prompt, temp=0.0):
            tokens.append(token)
            times.append(time.perf_counter())
            if len(tokens) == max_new_tokens:
                break
        return Decoded(tokens, started, times)

    def log_likelihood(self, prompt: list[int], reply: list[int]) -> float:
        """See `Decoder`."""
        if not self.llama._logits_all:
            del self.llama
            self.llama = llama_cpp.Llama(str(self.file), logits_all=True, **self.settings)
        self.llama.reset()
        self.llama.eval(prompt + reply)
        last = len(prompt) + len(reply) - 1
        logits = self.llama.scores[len(prompt) - 1 : last].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        known = logits[np.arange(len(reply)), reply]
        return float((known - np.log(np.exp(logits).sum(-1))).sum())


def written(order: Order) -> tuple[Path, str]:
    """Return the model's file in GGUF, which is written at the first call, and its format.

    Raises:
        RuntimeError: llama.cpp can't convert or quantise the model.
    """
    if order.dtype in CONVERTED:
        kind = CONVERTED[order.dtype]
        file = Path(order.weights) / f"{kind}.gguf"
        if not file.is_file():
            convert(order, kind, file)
        return file, kind.upper()
    kind, number = QUANTISED[order.dtype]
    file = Path(order.weights) / f"{kind}.gguf"
    if not file.is_file():
        whole = Path(order.weights) / "f32.gguf"
        if not whole.is_file():
            convert(order, "f32", whole)
        begun = file.with_name(f"{file.name}.{os.getpid()}")
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, order.threads
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(begun).encode(), settings):
            raise RuntimeError(f"llama_model_quantize failed for {kind}.")
        begun.rename(file)
    return file, kind


def convert(order: Order, kind: str, file: Path) -> None:
    """Write a model of `transformers` in GGUF, by llama.cpp's own script.

    Raises:
        RuntimeError: The script's own error.
    """
    [sources] = Path(sys.prefix).glob("sources/*/vendor/llama.cpp")
    begun = file.with_name(f"{file.name}.{os.getpid()}")
    words = [
        *(sys.executable, str(Path(__file__).with_name("llama_convert.py")), str(sources)),
        *(order.model, "--outtype", kind, "--outfile", str(begun)),
    ]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        text = done.stdout.decode()
        sys.stderr.write(text)
        raise RuntimeError(text.strip().splitlines()[-1])
    begun.rename(file)


if __name__ == "__main__":
    serve(LlamaCpp)
