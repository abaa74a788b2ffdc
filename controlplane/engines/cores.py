"""The CPU cores of one engine: those of its machine, divided by the engines there that compute on CPUs.

Engines that together have more threads than there are cores wait for each other at every layer of the model:
on two cores, three llama.cpp engines of two threads each served a fifth of what they served with one thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from controlplane.config import PlaneConfig, TierConfig

CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(limit_file: Path = CPU_MAX) -> int:
    """The cores that this process may use, at least 1: by its affinity, and by the limit of its control
    group, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit_file.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no control group of version 2, or no limit ("max")
    return max(1, cores)


def cores_for(tier: TierConfig, config: PlaneConfig, *, machine_cores: int, nodes: int = 1) -> int:
    """The cores for one engine of ``tier``, at least 1, if the plane's engines are spread evenly over
    ``nodes`` machines of ``machine_cores`` cores.

    That is what ``cpus`` of the tier reserves; without it, an equal share of what no other tier reserves. A
    tier that is scaled counts with the most replicas that it may have.
    """
    if tier.cpus >= 1:
        return min(int(tier.cpus), machine_cores)
    reserved, sharing = 0, 0
    for each, engines in _cpu_engines(config):
        if each.cpus >= 1:
            reserved += int(each.cpus) * engines
        else:
            sharing += engines
    here = max(1, math.ceil(sharing / nodes))
    return max(1, (machine_cores - reserved // nodes) // here)


def _cpu_engines(config: PlaneConfig) -> Iterable[tuple[TierConfig, int]]:
    """The tiers whose engines compute on CPUs, with the number of their engines."""
    scaled = config.controller.scaling.mode == "apply"
    for tier in config.tiers:
        if tier.engine == "llamacpp" or (tier.engine == "vllm" and tier.device == "cpu"):
            most = tier.scaling.max_replicas if scaled and tier.scaling is not None else 0
            yield tier, max(tier.replicas, most)
