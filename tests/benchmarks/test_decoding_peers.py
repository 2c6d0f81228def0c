"""fastvlm beside other engines: workers, rounds, environments and the report."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import decoding_peers
import fastvlm
from fastvlm.functional.errors import InputError
from fastvlm.functional.messages import TokenPrompt
from peers import contenders, environments
from peers.contenders import Contender, Worker, WorkerError, contenders_of
from peers.report import summary, table
from peers.rounds import Journal, Prompt
from peers.workers.worker_protocol import Decoded, Order
from tests.processors import character_tokenizer

# An engine whose next token is the sum of the last two; where a prompt begins with 9 it fails, with
# 8 it ends, with 7 it never answers. Its weights are exact in float32, its bfloat16 is off by one.
ENGINE = f"""
import os, sys, time
sys.path.insert(0, {str(contenders.WORKERS)!r})
from worker_protocol import Decoded, serve

class Fake:
    def __init__(self, order):
        print("a banner on standard output")
        if order.dtype == "int8":
            raise ValueError("no int8\\nhere")
        self.order, threads = order, os.environ["OMP_NUM_THREADS"]
        self.about = f"fake in {{order.dtype}}, {{threads}}"

    def decode(self, prompt, max_new_tokens, way):
        if prompt[0] == 9:
            raise RuntimeError("nine")
        if prompt[0] == 8:
            sys.exit(3)
        if prompt[0] == 7:
            time.sleep(100)
        step = .5 if way == "ordinary" else .25
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_new_tokens:
            tokens.append(sum(tokens[-2:]) % 50 + (self.order.dtype == "bfloat16"))
        print("chatter")
        times = [2 + step * n for n in range(max_new_tokens)]
        return Decoded(tokens[len(prompt):], 1.0, times, max_new_tokens // 2)

    def log_likelihood(self, prompt, reply):
        if self.order.dtype == "int4":
            raise NotImplementedError("no likelihoods")
        return -.5 * len(reply)

serve(Fake)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    file = tmp_path / "fake_worker.py"
    file.write_text(ENGINE)
    return [sys.executable, str(file)]


def order(dtype: str = "float32", *ways: str) -> Order:
    return Order("model", dtype, 3, ways or ("ordinary",), "weights", 64)


@pytest.fixture
def start(command: list[str], tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made = []

    def load(dtype: str = "float32", timeout: float = 600) -> Worker:
        made.append(Worker(command, order(dtype), tmp_path / "log", timeout))
        return made[-1]

    yield load
    for worker in made:
        worker.close()


def asked(*prompt: int, way: str = "ordinary") -> dict[str, Any]:
    return {"prompt": list(prompt), "max_new_tokens": 4, "way": way}


def test_a_worker_answers_and_survives_errors(start: Callable[..., Worker]) -> None:
    worker = start()
    assert worker.ready["about"] == "fake in float32, 3"
    with pytest.raises(WorkerError, match=r"^RuntimeError: nine$"):
        worker.ask(asked(9))
    answer = worker.ask(asked(1, 2))
    assert answer == {"token_ids": [3, 5, 8, 13], "ttft_ms": 1000, "tpot_ms": 500, "passes": 2}
    assert worker.ask({"prompt": [1], "reply": [2, 3]}) == {"log_likelihood": -1.0}
    assert not worker.has_ended


def test_what_an_engine_cannot_load_is_said_in_its_own_words(start: Callable[..., Worker]) -> None:
    with pytest.raises(WorkerError, match=r"^ValueError: no int8 here$"):
        start("int8")


def test_a_worker_that_ends_or_is_late(start: Callable[..., Worker]) -> None:
    worker = start()
    assert worker.ask(asked(1, 2))
    with pytest.raises(WorkerError, match=r"ended with 3: .*chatter"):
        worker.ask(asked(8))
    assert worker.has_ended
    worker = start()
    worker.timeout = 0.2
    with pytest.raises(WorkerError, match="no answer within 0 s"):
        worker.ask(asked(7))
    assert worker.has_ended


def test_times_and_tokens_belong_together() -> None:
    with pytest.raises(ValueError, match="3 tokens came at 2 times"):
        Decoded([1, 2, 3], 0.0, [0.1, 0.2]).record()
    # Drafted tokens come together; the time per token is that of all after the first.
    found = Decoded([1, 2, 3, 4], 1.0, [1.5, 2.5, 2.5, 3.0]).record()
    assert found == {"token_ids": [1, 2, 3, 4], "ttft_ms": 500, "tpot_ms": 500}


def test_contenders() -> None:
    found = contenders_of(["fastvlm", "vllm"], draft=False)
    assert found == [
        Contender("fastvlm", ("ordinary", "prompt lookup")),
        Contender("vllm", ("ordinary",)),
        Contender("vllm", ("prompt lookup",)),
    ]
    assert contenders_of(["fastvlm-onnx"], draft=True)[0].ways[2:] == ("draft", "cascade")


@pytest.fixture
def measure(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the command with the fake engine in every engine's place."""
    model = tmp_path / "model"
    character_tokenizer().save_pretrained(model)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"kind": kind, "prompt": text} for kind in "ab" for text in ("Hello", "Once", "So")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(decoding_peers, "command_of", lambda *_: command)

    def call(*options: object) -> dict[str, Any]:
        words = [
            *("decoding_peers", "--folder", tmp_path / "folder", "measure", "--model", model),
            *("--prompts", prompts, "--json", tmp_path / "found.json", "--max-new-tokens", 4),
            *("--threads", 3, *options),
        ]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        decoding_peers.main()
        return json.loads((tmp_path / "found.json").read_text())

    return call


def row(found: dict[str, Any], **fields: str) -> dict[str, Any]:
    [one] = [one for one in found["results"] if fields.items() <= one.items()]
    return one


def test_a_run(measure: Callable[..., dict[str, Any]]) -> None:
    found = measure("--engines", "fastvlm,transformers,vllm", "--limit", 3, "--loaded", 2)
    assert (found["prompts"], found["kinds"]) == (3, ["a", "b"])
    assert found["engines"]["vllm"]["bfloat16"] == "fake in bfloat16, 3"
    ours = row(found, engine="vllm", dtype="float32", way="prompt lookup")
    assert ours["tokens_per_second"] == [4, 4, 4]
    assert ours["speedup"] == [2, 2, 2]
    assert ours["speedup_by_kind"] == {"a": [2, 2, 2], "b": [2, 2, 2]}
    assert ours["tokens_per_pass"] == 1.5
    assert ours["same_as_transformers"] == ours["same_as_float32"] == [3, 3]
    other = row(found, engine="vllm", dtype="bfloat16", way="ordinary")
    assert other["same_as_transformers"] == [3, 3]
    assert other["same_as_float32"] == [0, 3]
    assert other["share_before_first_difference"] == 0
    assert other["log_likelihood"] == -0.5
    assert other["speedup"] is other["same_as_ordinary"] is None
    assert ours["same_as_ordinary"] == [3, 3]
    assert row(found, engine="vllm", dtype="int8", way="ordinary")["error"].endswith("no int8 here")
    rough = row(found, engine="vllm", dtype="int4", way="ordinary")
    assert rough["likelihood_error"] == "NotImplementedError: no likelihoods"
    assert rough["same_as_transformers"] is None
    # Compiled, `transformers` drafts nothing, and takes half of the time.
    fastest = found["fastest"]["float32"]
    assert fastest["ordinary"] == {
        "ours": ["fastvlm", "ordinary"],
        "theirs": ["transformers", "compiled"],
        "speedup": [0.5, 0.5, 0.5],
    }
    assert fastest["any"]["ours"] == ["fastvlm", "prompt lookup"]
    assert fastest["any"]["speedup"] == [1, 1, 1]
    assert found["fastest"]["int8"] == {}
    shown = table(found)
    assert "without drafts | 0.50x (0.50-0.50): fastvlm; transformers, compiled" in shown
    assert "| vLLM, prompt lookup | 4.0 (4.0-4.0), 2.00x |" in shown
    assert "| vLLM | 3 of 3; -0.500 | 0 of 3; -0.500 | - | 3 of 3; - |" in shown
    assert shown.count("no int8 here") == 1
    assert "model: greedy replies of 4 tokens to 3 prompts of 2 kinds" in shown


def test_a_run_goes_on(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = ("--engines", "transformers", "--dtypes", "float32")
    measure(*options, "--limit", 2)
    [file] = (tmp_path / "folder" / "records").iterdir()
    lines = file.read_text().splitlines()
    # All but the last records of the decoding, as after a kill.
    kept = [line for line in lines if '"scored"' not in line][:-1]
    file.write_text("\n".join(kept) + "\n")
    found = measure(*options, "--limit", 2, "--resume")
    assert row(found, way="ordinary")["replies"] == row(found, way="compiled")["replies"] == 2
    assert row(found, way="ordinary")["log_likelihood"] == -0.5
    again = file.read_text().splitlines()
    assert again[: len(kept)] == kept
    assert sum('"prompt"' in line for line in again) == 3 * 2
    with pytest.raises(InputError, match="other settings"):
        measure(*options, "--limit", 1, "--resume")


def test_workers_take_turns(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    measure("--engines", "fastvlm,vllm", "--dtypes", "float32", "--limit", 4, "--rounds", 2)
    [file] = (tmp_path / "folder" / "records").iterdir()
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    turns = [(one["engine"], one["way"], one["prompt"]) for one in records if "prompt" in one]
    assert [one[2] for one in turns] == [0] * 2 + [2] * 2 + [0, 2] * 2 + [1, 3] * 2 + [1] * 2 + [
        3
    ] * 2
    assert {one[:2] for one in turns[:4]} == {("fastvlm", "ordinary"), ("fastvlm", "prompt lookup")}
    assert turns[8][:2] == ("vllm", "ordinary")


def test_what_fails_is_asked_once(command: list[str], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "records.jsonl", {}, resumes=False)
    prompts = [Prompt("a", [9, 1]), Prompt("a", [1, 2])]
    run = decoding_peers.Measurement("float32", prompts, 4, journal, lambda _: None)
    loaded = []

    def load(contender: Contender) -> Worker:
        loaded.append(contender)
        return Worker(command, order(), tmp_path / "log", 600)

    run.run([Contender("vllm", ("ordinary",))], load, most=1, rounds=2)
    assert len(loaded) == 1
    errors = [one["error"] for one in journal.find(engine="vllm") if "error" in one]
    assert errors == ["RuntimeError: nine"]
    [result] = summary(journal, prompts)["results"]
    assert result["error"] == "RuntimeError: nine"


def test_ways_that_give_other_tokens_are_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "records.jsonl", {}, resumes=False)
    key = {"engine": "llama.cpp", "dtype": "int8", "prompt": 0, "ttft_ms": 1.0, "tpot_ms": 1.0}
    journal.add(**key, way="ordinary", token_ids=[1, 2, 3])
    journal.add(**key, way="prompt lookup", token_ids=[1, 2, 4])
    found = summary(journal, [Prompt("a", [1])])
    assert row(found, way="prompt lookup")["same_as_ordinary"] == [0, 1]
    about = {"hardware": {"processor": "one"}, "model": "m", "threads": 1, "max_new_tokens": 3}
    shown = table({**about, "dtypes": ["int8"], **found})
    assert "ordinary decoding, but llama.cpp, prompt lookup in int8 0." in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtypes", "float8"), "The precisions are float32"),
        (("--engines", "other"), "The engines are fastvlm"),
    ],
)
def test_a_bad_command(
    measure: Callable[..., dict[str, Any]], options: tuple[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure(*options)


def test_environments_are_made_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(folder: Path, **_: object) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environments.venv, "create", create)
    count = "import os; open(r'{folder}/count', 'a').write('x' + os.environ['COUNTED'])"
    failing = "import os, sys; sys.exit(None if os.path.exists(r'{folder}/mended') else 'no wheel')"
    steps = (("-c", count), ("-c", failing))
    own = environments.Environment(steps, {"COUNTED": "y"})
    monkeypatch.setitem(environments.ENVIRONMENTS, "vllm", own)
    words = ["decoding_peers", "--folder", str(tmp_path), "setup", "vllm"]
    monkeypatch.setattr(sys, "argv", words)
    folder = tmp_path / "environments" / "vllm"
    decoding_peers.main()
    assert "no wheel" in capsys.readouterr().out
    with pytest.raises(WorkerError, match=r"not set up: .*no wheel"):
        contenders.command_of("vllm", tmp_path)
    (folder / "mended").touch()
    decoding_peers.main()
    assert (folder / "count").read_text() == "xy"
    assert contenders.command_of("vllm", tmp_path)[0] == str(folder / "bin" / "python")
    monkeypatch.setattr(sys, "argv", [*words[:-1], "other"])
    with pytest.raises(InputError, match="got other"):
        decoding_peers.main()


PROMPT, REPLY = [5, 6, 7, 5, 6], [8, 9, 10]


@torch.inference_mode()
def plain_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def plain_likelihood(model: Any) -> float:
    logits = model(torch.tensor([PROMPT + REPLY])).logits[0].log_softmax(-1)
    return sum(float(logits[len(PROMPT) - 1 + n, token]) for n, token in enumerate(REPLY))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    # Matrices that are large enough to be quantised.
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2, eos_token_id=1))
    # What the reply is full of would end it.
    model.generation_config.eos_token_id = plain_greedy(model, PROMPT, 4)[2:]
    model.save_pretrained(tmp_path / "small")
    character_tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


WAYS = ("ordinary", "prompt lookup")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, small: Path) -> Callable[..., Any]:
    """Return a function that loads the small model into a worker."""
    monkeypatch.syspath_prepend(str(contenders.WORKERS))

    def load(module: str, name: str, dtype: str = "float32", **options: str) -> Any:
        asked = Order(str(small), dtype, torch.get_num_threads(), WAYS, str(small), 64)
        return getattr(importlib.import_module(module), name)(asked, **options)

    return load


def test_our_worker_and_that_of_transformers(small: Path, worker: Callable[..., Any]) -> None:
    ours = worker("fastvlm_worker", "FastVlm")
    theirs = worker("transformers_worker", "Transformers")
    model = LlamaForCausalLM.from_pretrained(small)
    known = plain_greedy(model, PROMPT, 12)
    for way in WAYS:
        one, other = ours.decode(PROMPT, 12, way), theirs.decode(PROMPT, 12, way)
        assert one.token_ids == other.token_ids == known
        assert len(one.token_ids) == len(one.times) == len(other.times) == 12
        assert one.record()["ttft_ms"] > 0
    for engine in (ours, theirs):
        found = engine.log_likelihood(PROMPT, REPLY)
        assert found == pytest.approx(plain_likelihood(model), rel=1e-4)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_our_worker_in_few_bits(small: Path, worker: Callable[..., Any], bits: str) -> None:
    ours = worker("fastvlm_worker", "FastVlm", bits)
    model = fastvlm.load(str(small), quantize=bits, runtime="torch").model
    known = plain_greedy(model, PROMPT, 12)
    assert all(ours.decode(PROMPT, 12, way).token_ids == known for way in WAYS)
    found, exact = ours.log_likelihood(PROMPT, REPLY), LlamaForCausalLM.from_pretrained(small)
    assert found == pytest.approx(plain_likelihood(model), rel=1e-3)
    assert found != pytest.approx(plain_likelihood(exact), rel=1e-5)


@pytest.mark.parametrize("bits", ["float32", "int8"])
def test_our_worker_with_onnx_runtime(small: Path, worker: Callable[..., Any], bits: str) -> None:
    ours = worker("fastvlm_worker", "FastVlm", bits, runtime="onnx")
    assert "onnxruntime" in ours.about
    exact = LlamaForCausalLM.from_pretrained(small)
    found = ours.log_likelihood(PROMPT, REPLY)
    # It is said of the weights that it decodes with, not of those in torch.
    same = found == pytest.approx(plain_likelihood(exact), rel=1e-5)
    assert same == (bits == "float32")
    assert found == pytest.approx(plain_likelihood(exact), rel=0.1)
    one, other = (ours.decode(PROMPT, 12, way).token_ids for way in WAYS)
    assert one == other
    assert bits == "int8" or one == plain_greedy(exact, PROMPT, 12)


def test_tokenizers_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text(
        "class TextModel:\n"
        "    def get_vocab_base_pre(self, tokenizer):\n"
        "        if tokenizer == 'new':\n"
        "            raise NotImplementedError\n"
        "        return 'known'\n"
    )
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys\n"
        "from conversion.base import TextModel\n"
        "assert __name__ == '__main__'\n"
        "print(*(TextModel().get_vocab_base_pre(one) for one in sys.argv[1:]))\n"
    )
    script = contenders.WORKERS / "llama_convert.py"
    words = [sys.executable, str(script), str(tmp_path), "old", "new"]
    assert subprocess.run(words, check=True, capture_output=True).stdout == b"known default\n"


def test_a_decoder_for_all_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["decoding_peers", "decoder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    decoding_peers.main()
    prompts, questions = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("prompts", "questions")
    )
    first, second = prompts[:2]
    assert first["kind"] == second["kind"] == "scene"
    assert first["prompt"] != second["prompt"]
    assert not {one["prompt"] for one in prompts} & {one["prompt"] for one in questions}
    example = fastvlm.load()
    tokens = example.tokenizer(first["prompt"])["input_ids"]
    read = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert read(first["prompt"])["input_ids"] == tokens
    said = [{"role": "user", "content": questions[0]["prompt"]}]
    assert read.apply_chat_template(said, tokenize=False) == questions[0]["prompt"]
    assert len(read) <= len(example.tokenizer)
    request = example.request(TokenPrompt(tokens), strategy="autoregressive", max_new_tokens=8)
    example.engine.run_all([request])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert written.config.model_type == "qwen2"
    known = plain_greedy(written, tokens, len(request.output_token_ids))
    assert request.output_token_ids == known
