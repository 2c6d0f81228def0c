"""A case in a process of its own: what it came to, how long it took and what memory it held."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvlm.functional.errors import FastVlmError

MAX_SECONDS = 10.0
"""Of computing."""
MAX_BYTES = 2**30
DEEPEST = 12
"""Lines at the end of a traceback that are kept."""

Kind = Literal["right", "sentence", "fault", "hang", "memory"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    Args:
        kind: `right`; `sentence`, an error of fastvlm's own; or what must not be: a `fault` (any
            other exception, or a wrong result), a `hang` or too much `memory`.
        said: The sentence, or what was wrong.
        seconds: How long it took.
        bytes: The most memory it held beyond that of the process before.
    """

    kind: Kind
    said: str
    seconds: float
    bytes: int

    @property
    def fine(self) -> bool:
        """Whether a user may see this."""
        return self.kind in ("right", "sentence")


def run(check: Callable[[Any], None], case: Any) -> Outcome:
    """Check a case in a forked process.

    The fork shares what this process has imported and loaded, so that it costs milliseconds; this
    process must not have computed with several threads.

    Args:
        check: Returns where the result is right, raises a `FastVlmError` where it is refused.
        case: What it is given.
    """
    gc.freeze()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reader)
        _work(check, case, writer)
    os.close(writer)
    answer = _read(reader, child)
    os.close(reader)
    seconds = time.monotonic() - started
    if answer is None:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer is None:
        return Outcome("hang", f"no end after {MAX_SECONDS:.0f} s", seconds, 0)
    if not answer:
        return Outcome("fault", f"the process died with status {status}", seconds, 0)
    kind, said, held = pickle.loads(answer)
    if held > MAX_BYTES and kind in ("right", "sentence"):
        kind, said = "memory", f"{held / 2**20:,.0f} MiB"
    return Outcome(kind, said, seconds, held)


def _work(check: Callable[[Any], None], case: Any, writer: int) -> None:
    os.setpgid(0, 0)
    # A message for a terminal that runs a thousand cases is for nobody.
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    before = _peak()
    try:
        check(case)
        found = ("right", "")
    except FastVlmError as error:
        found = _judged(str(error))
    except BaseException:  # noqa: BLE001 (SystemExit and KeyboardInterrupt are faults as well)
        found = ("fault", "".join(traceback.format_exc().splitlines(keepends=True)[-DEEPEST:]))
    os.write(writer, pickle.dumps((*found, _peak() - before)))
    os._exit(0)


def _judged(sentence: str) -> tuple[str, str]:
    """Return whether an error's message is one whole sentence."""
    whole = len(sentence.split()) > 2 and not sentence.rstrip().endswith((":", ",", "("))
    plain = "Traceback" not in sentence and "<class '" not in sentence and "\n\n" not in sentence
    return ("sentence" if whole and plain else "fault"), sentence


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            held = max(held, int(line.split()[1]))
    return held * 1024


def _read(reader: int, child: int) -> bytes | None:
    """Return what a process wrote until its end; None if it hangs.

    That is where it has computed for `MAX_SECONDS`, or has not ended after six times as long: other
    processes may have kept it waiting.
    """
    content, last = b"", time.monotonic() + 6 * MAX_SECONDS
    while (left := min(1.0, last - time.monotonic())) > 0 and _computed(child) < MAX_SECONDS:
        ready, _, _ = select.select([reader], [], [], left)
        if not ready:
            continue
        part = os.read(reader, 2**16)
        if not part:
            return content
        content += part
    return None


def _computed(process: int) -> float:
    """Return the seconds for which a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
