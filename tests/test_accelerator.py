"""The script for a machine with a GPU goes its whole way on the CPU, without rich."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "accelerator.py"
WITHOUT_RICH = (
    "import runpy, sys; sys.modules['rich'] = None; sys.argv = sys.argv[1:];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_RICH, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU here.")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = run("--json", str(tmp_path / "record.json"))
    assert out.returncode == 2
    assert out.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_goes_its_whole_way_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    out = run("--device", "cpu", "--quick", "--json", str(file))
    assert out.returncode == 0, out.stdout + out.stderr
    record = json.loads(file.read_text())
    assert record["tests"]["tests"] > record["tests"]["skipped"]
    assert len(record["cases"]) == 8
    for case in record["cases"]:
        assert case["different"] == 0
        ours = {n: row for n, row in case["results"].items() if n != "transformers"}
        assert {"autoregressive"} < set(ours)
        assert all(row["ms_per_token"]["median"] > 0 for row in ours.values())
        assert any(row["acceptance_rate"] for row in ours.values())
