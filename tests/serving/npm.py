"""Packages of npm, kept in the cache of whoever runs the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def npm_package(name: str, version: str) -> Path:
    """Return a package's folder, installed if it isn't yet; skip the test where it can't be."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"{name} comes with npm, which is not installed.")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "fastvlm" / "tests" / name
    found = folder / "node_modules" / name
    if not found.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--silent", "--no-save", "--prefix", str(folder)]
        if subprocess.run([*command, f"{name}@{version}"], check=False, timeout=120).returncode:
            pytest.skip(f"npm cannot install {name}.")
    return found
