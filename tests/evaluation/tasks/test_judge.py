"""Judges behind an endpoint, and grades that others published."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastvlm.data.tasks import Item
from fastvlm.data.tasks.llava_wild import LlavaWild
from fastvlm.data.tasks.mmvet import MmVet
from fastvlm.evaluation.tasks.answers import Answer
from fastvlm.evaluation.tasks.grades import judged, published, write_submission
from fastvlm.evaluation.tasks.judge import Judge
from fastvlm.functional.errors import InputError

MMVET = MmVet(
    (Item("v1_0", "What is x?", Path("x.png")), Item("v1_1", "Who?", Path("y.png"))),
    {"v1_0": "-1 <AND> -5", "v1_1": "Ann"},
    {"v1_0": ("math",), "v1_1": ("rec", "know")},
)
WILD = LlavaWild(
    (Item("0", "Where is this?", Path("a.jpg")),),
    {"0": "A beach."},
    {"0": "Hawaii."},
    {"0": "conv"},
)


class Endpoint(ThreadingHTTPServer):
    """A judge that gives what it is told to: a text, or a status to fail with."""

    def __init__(self) -> None:
        self.said: list[str | int] = []
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Endpoint)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        said = self.server.said.pop(0)
        if isinstance(said, int):
            self.send_error(said)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def reply(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def answer(task: str, item: str, text: str, strategy: str = "autoregressive") -> Answer:
    return Answer(task, item, None, strategy, text, (1, 2), 9, 1.0, 1.0, (), ())


def test_what_a_judge_is_asked_and_what_it_says(endpoint: Endpoint) -> None:
    endpoint.said = [reply("0.6"), reply("8 6\nBoth are fine.")]
    judge = Judge(endpoint.url, "critic", "secret")
    assert judge.grade(MMVET, "v1_0", "It is -1.") == [0.6]
    assert judge.grade(WILD, "0", "Maui.") == [8.0, 6.0]
    (path, key, body), (_, _, second) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert key == "Bearer secret"
    assert body["model"] == "critic"
    assert body["temperature"] == 0
    said = body["messages"][0]["content"]
    assert all(part in said for part in ("What is x?", "-1 <AND> -5", "It is -1."))
    said = second["messages"][0]["content"]
    assert said.index("Hawaii.") < said.index("Maui.")
    assert all(part in said for part in ("Where is this?", "A beach."))


def test_a_busy_judge_is_asked_again(endpoint: Endpoint) -> None:
    waited: list[float] = []
    endpoint.said = [503, 429, reply("1.0")]
    judge = Judge(endpoint.url, "critic", sleep=waited.append)
    assert judge.grade(MMVET, "v1_1", "Ann.") == [1.0]
    assert waited == [2.0, 4.0]
    assert endpoint.asked[0][1] is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([401], "refuses: HTTP Error 401"),
        ([500] * 4, "refuses: HTTP Error 500"),
        (["no JSON"], "not as OpenAI's protocol has it"),
        (['{"choices": []}'], "not as OpenAI's protocol has it"),
        ([reply("excellent")], "said 'excellent'"),
        ([reply("7")], "1 number from 0 to 1, but said '7'"),
    ],
)
def test_a_judge_that_is_no_help(endpoint: Endpoint, said: list[str | int], message: str) -> None:
    endpoint.said = list(said)
    with pytest.raises(InputError, match=message):
        Judge(endpoint.url, "critic", sleep=lambda _: None).grade(MMVET, "v1_1", "Ann.")
    assert endpoint.said == []


def test_a_judge_that_is_not_there(endpoint: Endpoint) -> None:
    gone = f"http://127.0.0.1:{endpoint.server_port + 1 if endpoint.server_port < 65535 else 1}"
    with pytest.raises(InputError, match="can't be reached"):
        Judge(gone, "critic", sleep=lambda _: None).grade(MMVET, "v1_1", "Ann.")
    with pytest.raises(InputError, match="starts with http"):
        Judge("file:///etc/hosts", "critic")


def test_equal_replies_are_graded_once_and_grades_are_kept(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    answers = [
        answer("mmvet", "v1_0", "-1"),
        answer("mmvet", "v1_0", "-1", "prompt-lookup"),
        answer("mmvet", "v1_1", "Bob"),
        answer("coco", "7", "A dog."),
    ]
    tasks: dict[str, Any] = {"mmvet": MMVET, "coco": _Unjudged()}
    endpoint.said = [reply("0.5"), 401]
    judge = Judge(endpoint.url, "critic")
    file = tmp_path / "grades.jsonl"
    with pytest.raises(InputError, match="401"):
        judged(judge, tasks, answers, file)
    endpoint.said = [reply("0.0")]
    found = judged(judge, tasks, answers, file)
    assert found == {("mmvet", "v1_0", "-1"): [0.5], ("mmvet", "v1_1", "Bob"): [0.0]}
    assert judged(judge, tasks, answers, file) == found
    endpoint.said = [reply("1.0"), reply("1.0")]
    other = judged(Judge(endpoint.url, "another"), tasks, answers, file)
    assert set(map(tuple, other.values())) == {(1.0,)}


class _Unjudged:
    judged = False


def test_published_grades_give_the_published_scores(data: Path) -> None:
    from fastvlm.functional.text_files import read_json, read_json_lines

    folder = data / "mmvet"
    asked = read_json(folder / "mm-vet.json")
    task = MmVet(
        tuple(Item(key, line["question"], Path()) for key, line in asked.items()),
        {key: line["answer"] for key, line in asked.items()},
        {key: line["capability"] for key, line in asked.items()},
    )
    results = folder / "llava15" / "results"
    answers = [
        answer("mmvet", key, text)
        for key, text in read_json(results / "llava-v1.5-7b.json").items()
    ]
    grades = published("mmvet", task, results / "llava-v1.5-7b_gpt-4-grade-3runs.json", answers)
    scores = task.score({item: grade for (_, item, _), grade in grades.items()})
    assert round(scores["total"], 1) == 31.1
    said = data / "llava_bench_wild" / "llava15"
    answers = [
        answer("llava-wild", str(line["question_id"]), line["text"])
        for line in read_json_lines(said / "answers" / "llava-v1.5-7b.jsonl")
    ]
    reviews = published("llava-wild", WILD, said / "reviews" / "llava-v1.5-7b-eval1.jsonl", answers)
    assert len(reviews) == 60


def test_replies_as_the_publishers_take_them(tmp_path: Path) -> None:
    answers = [answer("mmvet", "v1_0", "-1"), answer("mmvet", "v1_1", "Bob")]
    file = write_submission(tmp_path / "submissions", "mmvet", MMVET, answers, "tiny")
    assert json.loads(file.read_text()) == {"v1_0": "-1", "v1_1": "Bob"}
    file = write_submission(
        tmp_path / "submissions", "llava-wild", WILD, [answer("llava-wild", "0", "Maui.")], "tiny"
    )
    [line] = file.read_text().splitlines()
    known = {"question_id": 0, "prompt": "Where is this?", "text": "Maui.", "model_id": "tiny"}
    assert known.items() <= json.loads(line).items()
