"""What a server keeps to train the next draft on, and how the next draft comes to be served."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
import torch

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import Conversation
from fastvlm.data.reading import read_conversations
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.functional.files import written_directory
from fastvlm.serving.app import Server
from fastvlm.serving.kept_replies import KeptReplies
from fastvlm.serving.next_draft import DraftWatch, draft_label
from fastvlm.serving.settings import ServerSettings
from fastvlm.training.replies import data_replies, questions_of
from fastvlm.vlm import VisionLanguageModel
from tests.models import small_vlm
from tests.serving.serving import NAME, asked, served


def save(vlm: VisionLanguageModel, folder: Path, seed: int) -> None:
    """Save an untrained draft in a folder, all at once."""
    torch.manual_seed(seed)
    network = ImitationNetwork(
        ImitationConfig(
            kind="mlp",
            exit_layer=2,
            text_config=vlm.model.config.get_text_config().to_dict(),
            target=fingerprint(vlm.model),
            num_speculative_tokens=3,
            confidence=0.0,
        )
    )
    with written_directory(folder) as beside:
        network.save_pretrained(beside)


@pytest.fixture
def vlm() -> VisionLanguageModel:
    return small_vlm(torch.float32, max_slots=4)


def test_a_new_draft_is_taken_and_no_reply_changes(
    vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    expected = vlm.generate("Hello.", max_new_tokens=30).token_ids
    save(vlm, tmp_path / "draft", 1)
    watch = DraftWatch(vlm, tmp_path / "draft", 60)
    assert not watch.look()
    begun = vlm.stream("Hello.", max_new_tokens=30)
    next(begun)
    save(vlm, tmp_path / "draft", 2)
    assert watch.look()
    assert not watch.look()
    first = vlm.network
    assert first is not None
    replies = [vlm.generate("Hello.", max_new_tokens=30)]
    save(vlm, tmp_path / "draft", 3)
    assert watch.look()
    assert vlm.network is not None
    assert draft_label(vlm.network) != draft_label(first)
    replies.append(vlm.generate("Hello.", max_new_tokens=30))
    for _ in begun:
        pass
    assert begun.reply.token_ids == expected
    assert [reply.token_ids for reply in replies] == [expected, expected]
    assert all(reply.statistics.proposed for reply in replies)


def test_what_is_no_draft_leaves_the_one_before(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    save(vlm, folder, 1)
    vlm.network = load_draft(folder, vlm.model)
    watch = DraftWatch(vlm, folder, 60)
    known = vlm.network
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert not watch.look()
    shutil.rmtree(folder)
    assert not watch.look()
    assert vlm.network is known
    save(vlm, folder, 2)
    assert watch.look()
    assert vlm.network is not known


def test_the_watch_goes_on_after_any_error(
    vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, again = iter([1]), threading.Event()

    def look(_: DraftWatch) -> bool:
        if next(calls, None):
            raise RuntimeError("of a library")
        again.set()
        return False

    monkeypatch.setattr(DraftWatch, "look", look)
    with DraftWatch(vlm, tmp_path, 0.01):
        assert again.wait(20)


def test_a_reply_that_cannot_be_kept_is_said_once(
    vlm: VisionLanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = vlm.request("Hello.", max_new_tokens=4)
    vlm.engine.run_all([request])
    # As if the reply had come to its own end.
    request.finish_reason = "stop"
    request.end_token_ids = frozenset(request.output_token_ids)

    def fail(_: object) -> object:
        raise RuntimeError("no text")

    monkeypatch.setattr(vlm, "reply", fail)
    with KeptReplies(vlm, tmp_path) as kept:
        kept.add(request)
        kept.add(request)
    assert [record.message for record in caplog.records] == ["replies are not kept"]


@pytest.fixture
def address(vlm: VisionLanguageModel, tmp_path: Path) -> Iterator[str]:
    with ExitStack() as running:
        yield running.enter_context(served(vlm, keep_replies=tmp_path / "kept"))


def test_metrics_show_each_draft(vlm: VisionLanguageModel, address: str, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    watch = DraftWatch(vlm, tmp_path / "draft", 60)
    labels = []
    for seed in (1, 2):
        save(vlm, tmp_path / "draft", seed)
        assert watch.look()
        assert vlm.network is not None
        labels.append(draft_label(vlm.network))
        client.chat.completions.create(model=NAME, messages=asked(1), max_tokens=20, temperature=0)
    text = httpx.get(f"{address}/metrics").text
    for metric in ("draft_tokens", "accepted_tokens"):
        found = re.findall(rf'fastvlm:{metric}_total{{draft="(\w+)"', text)
        assert sorted(found) == sorted(labels)


def test_kept_replies_are_what_a_draft_learns_from(
    vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    with KeptReplies(vlm, tmp_path) as kept:
        for prompt, options in (
            ("A secret.", {"max_new_tokens": 400, "temperature": 3.0, "seed": 1}),
            ("A secret.", {"max_new_tokens": 400, "temperature": 3.0, "seed": 2}),
            ("Another.", {"max_new_tokens": 2}),
        ):
            request = vlm.request(prompt, **options)
            vlm.engine.run_all([request])
            kept.add(request)
            if options["max_new_tokens"] > 2:
                request.finish_reason = "stop"
                request.output_token_ids.append(next(iter(vlm.end_tokens)))
                kept.add(request)
    [file] = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) >= 2
    assert "secret" not in file.read_text()
    assert len({row["prompt_sha256"] for row in rows}) == 1
    records = read_conversations(file)
    assert all(isinstance(record, Conversation) for record in records)
    questions = questions_of(records, BrokenRecords())
    examples = data_replies(vlm, questions)
    texts = [vlm.tokenizer.decode(one.reply, skip_special_tokens=True).strip() for one in examples]
    assert texts == [row["messages"][1]["content"] for row in rows]
    assert vlm.request(examples[0].messages, max_new_tokens=1).prompt_token_ids


def test_nothing_is_kept_unless_asked_for(vlm: VisionLanguageModel) -> None:
    server = Server(vlm, NAME, ServerSettings())
    assert (server.kept, server.watch) == (None, None)
