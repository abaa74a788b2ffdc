"""This machine's CPU features and memory."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP_MAX = Path("/sys/fs/cgroup/memory.max")
_CGROUP_CURRENT = Path("/sys/fs/cgroup/memory.current")
_CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Main memory of this machine, or of this process's container if its limit is lower."""

    total_bytes: int
    available_bytes: int


def packs_16_bit() -> bool:
    """Whether oneDNN packs 16-bit matrices on this CPU, which it does except on x86 without AVX-512."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return True
    try:
        return "avx512" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def node_memory() -> NodeMemory:
    """Total and available memory now, within the limit of the control group."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    try:
        limit = int(_CGROUP_MAX.read_text())
        used = int(_CGROUP_CURRENT.read_text())
        stat = dict(line.split() for line in _CGROUP_STAT.read_text().splitlines())
    except (OSError, ValueError):
        return NodeMemory(total, available)
    # The kernel can drop these file pages, so they count as available.
    used -= int(stat.get("inactive_file", 0))
    return NodeMemory(min(total, limit), min(available, limit - used))
