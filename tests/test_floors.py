"""Folders are floors, and imports go down: to the same folder, or to a strictly lower floor."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fastvlm"
NAME = "fastvlm"
INIT = ""  # the part that `fastvlm/__init__.py` is

FLOORS = {
    "functional": 0,
    "example": 1,
    "language": 1,
    "metrics": 1,
    "vision": 1,
    "checkpoints": 2,
    "data": 2,
    "drafting": 2,
    "runtimes": 3,
    "decoding": 3,
    "prompts": 3,
    "custom_generate": 4,
    "request_builder": 4,
    "vlm": 5,
    INIT: 5,
    "captioning": 6,
    "evaluation": 6,
    "export": 6,
    "training": 6,
    "cli": 9,
    "cluster": 8,
    "lmms": 7,
    "serving": 7,
}
"""The floor of each part, which is a folder or a module directly under the package."""


def part_of(file: Path, package: Path) -> str:
    """Name the part that a source file belongs to."""
    first, *rest = file.relative_to(package).with_suffix("").parts
    return INIT if first == "__init__" and not rest else first


def imported_names(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) for all that a file imports, wherever in it that stands.

    `from a import b` yields `a.b`, as `b` may be a module.
    """
    parents = (NAME, *file.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            module = (*base, node.module) if node.module else base
            for alias in node.names:
                yield node.lineno, ".".join((*module, alias.name))


def imported_part(name: str, package: Path) -> str | None:
    """Name the part that an absolute dotted name leads to; None if it is not ours."""
    root, *rest = name.split(".")
    if root != NAME:
        return None
    if not rest:
        return INIT
    first = rest[0]
    is_part = first in FLOORS or (package / first).is_dir() or (package / f"{first}.py").is_file()
    # `from fastvlm import load` takes a name out of `fastvlm/__init__.py`; `fastvlm.a.b` can't.
    return first if is_part or len(rest) > 1 else INIT


def violations(package: Path) -> list[str]:
    """Say where the sources under a package break the rule, one sentence for each import."""
    found = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package.parent)
        part = part_of(file, package)
        if part not in FLOORS:
            found.append(f"{place}: {part!r} has no floor; add it to FLOORS in {__file__}.")
            continue
        for line, name in imported_names(file, package):
            target = imported_part(name, package)
            if target is None or target == part:
                continue
            if target not in FLOORS:
                found.append(f"{place}:{line} imports {name}, but {target!r} has no floor.")
                continue
            # The package's face shows what stands on its own floor: load, generate, chat.
            allowed = FLOORS[part] if part == INIT else FLOORS[part] - 1
            if FLOORS[target] > allowed:
                found.append(
                    f"{place}:{line} imports {name} (floor {FLOORS[target]})"
                    f" from {part or NAME} (floor {FLOORS[part]}); imports go down only."
                )
    return found


def plant(package: Path, place: str, source: str) -> None:
    """Write a module into a temporary package."""
    file = package / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / NAME
    for part in FLOORS:
        if part != INIT:
            plant(root, f"{part}/__init__.py", "")
    plant(root, "__init__.py", "def load(): ...\n")
    return root


def test_imports_go_down() -> None:
    assert (PACKAGE / "functional").is_dir(), f"No sources at {PACKAGE}."
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_inference_imports_neither_data_nor_training_nor_evaluation() -> None:
    inference = {"functional", "language", "vision", "drafting", "decoding", "prompts"}
    inference |= {"checkpoints", "custom_generate", "vlm", "example", INIT}
    found = [
        f"{file}:{line} imports {name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if part_of(file, PACKAGE) in inference
        for line, name in imported_names(file, PACKAGE)
        if imported_part(name, PACKAGE) in {"data", "training", "evaluation"}
    ]
    assert not found


@pytest.mark.parametrize(
    ("place", "source", "imported", "floors"),
    [
        ("functional/a.py", "\nimport fastvlm.vision.b", "2 imports fastvlm.vision.b", (1, 0)),
        ("vision/a.py", "from fastvlm import vlm", "1 imports fastvlm.vlm", (5, 1)),
        ("vision/a.py", "from fastvlm import load", "1 imports fastvlm.load", (5, 1)),
        ("vision/a.py", "import fastvlm", "1 imports fastvlm", (5, 1)),
        ("vision/a.py", "from ..language import b", "1 imports fastvlm.language.b", (1, 1)),
        ("vision/a.py", "from .. import cli", "1 imports fastvlm.cli", (9, 1)),
        ("vision/__init__.py", "from ..cli import b", "1 imports fastvlm.cli.b", (9, 1)),
        (
            "drafting/a/b.py",
            "from ...decoding.c import d",
            "1 imports fastvlm.decoding.c.d",
            (3, 2),
        ),
        ("vlm.py", "def f():\n    import fastvlm.cli", "2 imports fastvlm.cli", (9, 5)),
        ("vlm.py", "if TYPE_CHECKING:\n    from .cli import b", "2 imports fastvlm.cli.b", (9, 5)),
        ("__init__.py", "from fastvlm.training import b", "1 imports fastvlm.training.b", (6, 5)),
    ],
)
def test_an_upward_import_is_found(
    package: Path, place: str, source: str, imported: str, floors: tuple[int, int]
) -> None:
    plant(package, place, source)
    (message,) = violations(package)
    assert message.startswith(f"{NAME}/{place}:{imported} (floor {floors[0]}) from ")
    assert f"(floor {floors[1]})" in message


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("vision/a.py", "import torch\nfrom fastvlm.functional.b import c"),
        ("vision/a.py", "from . import b\nfrom .b import c\nfrom fastvlm.vision import d"),
        ("vision/a/b.py", "from ..c import d\nfrom ...functional import e"),
        ("decoding/a.py", "from fastvlm import drafting, language, vision"),
        ("cli.py", "import fastvlm\nfrom fastvlm import load, training\nimport fastvlm.vlm as v"),
        ("__init__.py", "from fastvlm.vlm import load\nfrom .vision import b"),
    ],
)
def test_a_downward_import_is_fine(package: Path, place: str, source: str) -> None:
    plant(package, place, source)
    assert not violations(package)


def test_a_part_without_a_floor_is_found(package: Path) -> None:
    plant(package, "helpers.py", "")
    plant(package, "cli.py", "import fastvlm.helpers")
    in_cli, in_helpers = violations(package)
    assert in_cli == "fastvlm/cli.py:1 imports fastvlm.helpers, but 'helpers' has no floor."
    assert in_helpers.startswith("fastvlm/helpers.py: 'helpers' has no floor;")
