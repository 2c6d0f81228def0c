"""What is deployed fits the server: its metrics, its options, its endpoints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from fastvlm.cli.verbs import command
from tests.models import small_vlm
from tests.serving.serving import NAME, served

DEPLOY = Path(__file__).parents[2] / "deploy"
VLLMS = {
    "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens_per_pos_total",
    "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket", "num_requests_running", "num_requests_waiting",
    "prefix_cache_hits_total", "prefix_cache_queries_total", "prompt_tokens_total",
    "generation_tokens_total", "request_success_total",
}  # fmt: skip
"""Metrics that vLLM's users have dashboards for, without `vllm:`."""


def samples(address: str) -> dict[str, dict[str, float]]:
    """Return the metrics by name and labels (without the model's)."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
        for one in family.samples:
            labels = ",".join(v for k, v in one.labels.items() if k != "model_name")
            found.setdefault(one.name, {})[labels] = one.value
    return found


def test_metrics_are_those_that_dashboards_know_and_what_clients_count() -> None:
    with served(small_vlm(torch.float32)) as address:
        before = samples(address)
        # All but those of a position, which there may be none of, are there from the beginning.
        assert {f"vllm:{name}" for name in VLLMS if "per_pos" not in name} <= before.keys()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        usages = []
        for number in range(4):
            found: Any = client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": f"Hello {number % 2}."}],
                max_tokens=30, temperature=1, seed=3, n=2, extra_body={"strategy": "early-exit"},
            )  # fmt: skip
            usages.append(found.usage)
        shown = samples(address)
        panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    assert {f"vllm:{name}" for name in VLLMS} <= shown.keys()
    used = set(re.findall(r"vllm:\w+", json.dumps(panels)))
    assert used <= shown.keys()
    assert len(used) >= len(VLLMS)

    def total(name: str) -> float:
        return sum(shown[f"vllm:{name}"].values())

    accepted = sum(one.completion_tokens_details.accepted_prediction_tokens for one in usages)
    rejected = sum(one.completion_tokens_details.rejected_prediction_tokens for one in usages)
    assert accepted
    assert total("generation_tokens_total") == sum(one.completion_tokens for one in usages)
    assert total("prompt_tokens_total") == 2 * sum(one.prompt_tokens for one in usages)
    assert total("spec_decode_num_accepted_tokens_total") == accepted
    assert total("spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert total("spec_decode_num_draft_tokens_total") == accepted + rejected
    assert shown["vllm:request_success_total"]["length"] == 8
    assert total("prefix_cache_queries_total") == total("prompt_tokens_total")
    assert shown["vllm:time_to_first_token_seconds_count"][""] == 8
    assert total("num_requests_running") == total("num_requests_waiting") == 0


def test_the_dashboard_is_one() -> None:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert board["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert "$model" in target["expr"]


def understood(words: list[str]) -> None:
    """Check that the command line of a server is one."""
    verb: Any = command()
    for word in words[:1]:
        verb = verb.commands[word]
    verb.make_context("fastvlm", words[1:])


def test_the_units_command_line_is_one() -> None:
    text = (DEPLOY / "fastvlm.service").read_text()
    line = re.search(r"^ExecStart=/opt/fastvlm/bin/fastvlm (.*)$", text, re.MULTILINE)
    assert line is not None
    *words, options = line[1].split()
    assert options == "$FASTVLM_OPTIONS"
    understood(words)
    drain = float(words[words.index("--drain-seconds") + 1])
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > drain + 5


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "fastvlm.service"
    text = (DEPLOY / "fastvlm.service").read_text()
    # Whether the command is installed here plays no part.
    unit.write_text(text.replace("/opt/fastvlm/bin/fastvlm", sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_the_containers_command_line_is_one() -> None:
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    entry = next(
        line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT")
    )
    understood(json.loads(entry)[1:])
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] not in ("root", "0")
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (DEPLOY.parent / source).exists(), source
