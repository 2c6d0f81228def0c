"""lmms-eval itself runs its tasks on this engine."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import fastvlm
from tests.processors import sample_image, saved

ROOT = Path(__file__).parents[1]
RELEASE = "lmms-eval==0.7.3"
IMPORTED = (
    "evaluate", "jsonlines", "loguru", "openai", "python-dotenv", "pytablewriter", "sacrebleu",
    "scikit-learn", "sqlitedict", "sympy", "tenacity", "tqdm-multiprocess",
)  # fmt: skip
"""What it imports of what it asks for; the rest would bring another torch and a CUDA."""
FUNCTIONS = """
from PIL import Image


def visual(doc, *args, **kwargs):
    return [Image.open(doc["image"]).convert("RGB")]


def said(doc, replies, **kwargs):
    return {"score": float(bool(replies[0]))}


def picked(doc, replies, **kwargs):
    return {"score": float(replies[0][:1] == doc["answer"])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: {text}
doc_to_target: answer
process_results: !function functions.{score}
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has lmms-eval, and ours beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    found = [
        sysconfig.get_paths()["purelib"],
        str(ROOT / "src"),
        str(ROOT / "packages/example-model"),
    ]
    place = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
    )
    Path(place.strip(), "ours.pth").write_text("\n".join(found))
    pip = [python, "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--no-deps", RELEASE], check=True)
    subprocess.run([*pip, *IMPORTED], check=True)
    return python


@pytest.mark.slow
def test_lmms_eval_runs_two_tasks(python: Path, tmp_path: Path) -> None:
    model, tasks, rows = tmp_path / "model", tmp_path / "tasks", tmp_path / "rows.jsonl"
    saved("llava", model)
    tasks.mkdir()
    lines = []
    for number in range(4):
        image = tmp_path / f"{number}.png"
        sample_image(number).save(image)
        lines.append({"image": str(image), "question": "What is it?", "answer": "AB"[number % 2]})
    rows.write_text("\n".join(map(json.dumps, lines)))
    (tasks / "functions.py").write_text(FUNCTIONS)
    for name, text, score in (
        ("shapes_say", "question", "said"),
        ("shapes_pick", '"{{question}} A: red. B: blue."', "picked"),
    ):
        task = TASK.format(name=name, rows=rows, text=text, score=score)
        (tasks / f"{name}.yaml").write_text(task)
    done = subprocess.run(
        [python, "-m", "lmms_eval", "--model", "fastvlm", "--model_args", f"pretrained={model}",
         "--tasks", "shapes_say,shapes_pick", "--include_path", tasks, "--batch_size", "2",
         "--output_path", tmp_path / "out", "--log_samples"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    vlm = fastvlm.load(model)
    for name in ("shapes_say", "shapes_pick"):
        [file] = (tmp_path / "out").rglob(f"*samples_{name}.jsonl")
        found = sorted(
            map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"]
        )
        assert len(found) == 4
        for row, line in zip(found, lines, strict=True):
            asked = line["question"] + (" A: red. B: blue." if name == "shapes_pick" else "")
            reply = vlm.generate(asked, line["image"], max_new_tokens=6)
            assert row["filtered_resps"] == reply.text.strip()
