"""lmms-eval itself runs tasks of both kinds on fastvlm, in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_example.scenes import render, sample
from tests.processors import saved

VERSION = "0.7.3"
IMPORTED = (
    "loguru", "evaluate", "jsonlines", "pytablewriter", "sacrebleu", "tenacity", "python-dotenv",
    "httpx", "scikit-learn", "requests", "nltk",
)  # fmt: skip
"""What it imports at the start and this environment lacks; all that it asks for is several GB."""
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function own.visual
doc_to_text: "{{{{question}}}}"
task: own_{kind}
output_type: {kind}
{rest}
"""
GENERATE = """doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
VISUAL = """from PIL import Image


def visual(doc):
    return [Image.open(doc["file"]).convert("RGB")]
"""
RUN = "from lmms_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with lmms-eval that finds everything else in this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    found = folder / "bin" / "python"
    asked = [str(found), "-c", "import site; print(site.getsitepackages()[0])"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    torch, here = (importlib.util.find_spec(name) for name in ("torch", "fastvlm"))
    assert torch is not None
    assert torch.origin is not None
    assert here is not None
    assert here.origin is not None
    places = [Path(spec).parents[1] for spec in (here.origin, torch.origin)]
    (site / "shared.pth").write_text("".join(f"{place}\n" for place in places))
    pip = [str(found), "-m", "pip", "-q", "--disable-pip-version-check"]
    reached = subprocess.run(
        [*pip, "download", "--no-deps", "-d", str(folder), f"lmms-eval=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if reached.returncode:
        pytest.skip(f"pip can't fetch lmms-eval {VERSION}: {reached.stderr.strip()[-200:]}")
    [wheel] = folder.glob("lmms_eval-*.whl")
    subprocess.run([*pip, "install", *IMPORTED], check=True)
    subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    return found


@pytest.mark.slow
def test_replies_and_choices(python: Path, tmp_path: Path) -> None:
    saved("llava", tmp_path / "model")
    rows = []
    for number in range(3):
        file = tmp_path / f"{number}.png"
        render(sample(number), 64).save(file)
        row = {"file": str(file), "question": "What is it?", "answer": "red"}
        rows.append({**row, "choices": ["red", "a blue one"], "gold": number % 2})
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "own.py").write_text(VISUAL)
    for kind, rest in (("generate_until", GENERATE), ("multiple_choice", CHOOSE)):
        (tasks / f"{kind}.yaml").write_text(TASK.format(data=data, kind=kind, rest=rest))
    options = {
        "--model": "fastvlm",
        "--model_args": f"pretrained={tmp_path / 'model'}",
        "--tasks": "own_generate_until,own_multiple_choice",
        "--include_path": str(tasks),
        "--batch_size": "2",
        "--output_path": str(tmp_path / "out"),
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [str(python), "-c", RUN, *(word for pair in options.items() for word in pair),
         "--log_samples"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    files = list((tmp_path / "out").rglob("*results.json"))
    assert files, done.stderr[-2000:]
    scores = json.loads(files[0].read_text())["results"]
    assert set(scores) == {"own_generate_until", "own_multiple_choice"}
    [samples] = (tmp_path / "out").rglob("*samples_own_multiple_choice.jsonl")
    chosen = 0
    for line in samples.read_text().splitlines():
        sampled = json.loads(line)
        losses = [float(loss) for loss, _ in sampled["filtered_resps"]]
        assert min(losses) > 0
        chosen += losses.index(min(losses)) == int(sampled["target"])
    assert scores["own_multiple_choice"]["acc,none"] == pytest.approx(chosen / 3)
