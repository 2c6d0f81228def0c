"""OpenVINO GenAI."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker_protocol import (
    ORDINARY,
    PROMPT_LOOKUP_NGRAM,
    PROMPT_LOOKUP_TOKENS,
    Decoded,
    Order,
    serve,
)

EXPORTED = {"float32": "fp32", "bfloat16": "fp32", "int8": "int8", "int4": "int4"}
"""The weights that `optimum-cli` writes; those of bfloat16 are rounded as they are loaded."""
EXACT = {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"INFERENCE_PRECISION_HINT": "f32", **EXACT},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16", **EXACT, "KV_CACHE_PRECISION": "bf16"},
    "int8": {},
    "int4": {},
}
"""Settings beside the default ones, which quantise the cache and activations, too."""


class Times(openvino_genai.StreamerBase):
    """Notes when each token is known."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, tokens: int | list[int]) -> Any:
        """Note one token, or the tokens of one pass."""
        count = 1 if isinstance(tokens, int) else len(tokens)
        self.times += [time.perf_counter()] * count
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Do nothing."""


class OpenVINO:
    """See `Decoder`."""

    def __init__(self, order: Order) -> None:
        [self.way] = order.ways
        self.folder = exported(order)
        self.settings = {
            "INFERENCE_NUM_THREADS": order.threads,
            "PERFORMANCE_HINT": "LATENCY",
            **PRECISIONS[order.dtype],
        }
        own = {key: value for key, value in self.settings.items() if not key.startswith("PERF")}
        self.about = f"openvino-genai {version('openvino-genai')}, {own}"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1
        looks_up = {} if self.way == ORDINARY else {"prompt_lookup": True}
        self.pipeline = openvino_genai.LLMPipeline(
            str(self.folder), "CPU", scheduler_config=scheduler, **looks_up, **self.settings
        )

    @cached_property
    def _model(self) -> Any:
        """The model alone: the pipeline doesn't say how likely given tokens are."""
        file = self.folder / "openvino_model.xml"
        return openvino.Core().compile_model(file, "CPU", self.settings)

    def decode(self, prompt: list[int], max_new_tokens: int, way: str) -> Decoded:
        """See `Decoder`."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.do_sample = False
        config.ignore_eos = True
        if way != ORDINARY:
            config.num_assistant_tokens = PROMPT_LOOKUP_TOKENS
            config.max_ngram_size = PROMPT_LOOKUP_NGRAM
        streamer, started = Times(), time.perf_counter()
        found = self.pipeline.generate(openvino.Tensor(np.array([prompt])), config, streamer)
        return Decoded(found.tokens[0], started, streamer.times)

    def log_likelihood(self, prompt: list[int], reply: list[int]) -> float:
        """See `Decoder`."""
        model = self._model
        tokens = np.array([prompt + reply])
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(tokens.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in model.inputs for name in port.names}
        request = model.create_infer_request()
        outputs = request.infer({name: value for name, value in given.items() if name in names})
        logits = outputs[model.output("logits")][0, len(prompt) - 1 : -1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        known = logits[np.arange(len(reply)), reply]
        return float((known - np.log(np.exp(logits).sum(-1))).sum())


def exported(order: Order) -> Path:
    """Return the folder with the model as OpenVINO reads it, which is written at the first call."""
    kind = EXPORTED[order.dtype]
    folder = Path(order.weights) / f"openvino-{kind}"
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.{os.getpid()}")
        words = [
            *(str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"),
            *("--model", order.model, "--task", "text-generation-with-past"),
            *("--weight-format", kind, str(begun)),
        ]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            text = done.stdout.decode()
            sys.stderr.write(text)
            raise RuntimeError(text.strip().splitlines()[-1])
        begun.rename(folder)
    return folder


if __name__ == "__main__":
    serve(OpenVINO)
