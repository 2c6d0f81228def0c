"""The memory that a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
"""Where Linux says what memory there is, and how much of it a container may have."""


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has left; None where the system doesn't say."""
    if device.type == "cuda":
        # What torch holds and doesn't use is free for it.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        limit: int = torch.mps.recommended_max_memory()
        return max(limit - torch.mps.driver_allocated_memory(), 0)
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    left = 1024 * int(fields["MemAvailable"].split()[0])
    limit_file, used_file = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit_file.exists() and (limit_text := limit_file.read_text().strip()) != "max":
        left = min(left, max(int(limit_text) - int(used_file.read_text()), 0))
    return left
