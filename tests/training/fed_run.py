"""A run whose data is prepared by workers, as a program of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastvlm.functional.errors import FastVlmError
from fastvlm.training.loop import train
from fastvlm.training.schedule import Schedule
from tests.training.children import Rows

SETTINGS: dict[str, Any] = {"steps": 40, "log_seconds": 0}


def main() -> int:
    """Train in a folder; what the task is comes as JSON."""
    output, task = sys.argv[1:]
    try:
        train(
            Rows(**json.loads(task)),
            Schedule(learning_rate=0.05, warmup=5, **SETTINGS),
            Path(output),
        )
    except FastVlmError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
