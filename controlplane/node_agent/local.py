"""The node agent of this machine, with the GPUs that its NVIDIA driver has."""

from __future__ import annotations

import functools

from controlplane.node_agent.agent import NodeAgent
from controlplane.node_agent.nvml.events import EventWatcher
from controlplane.node_agent.nvml.reader import GpuReader


def local_agent(
    node_id: str,
    *,
    interval_s: float = 1.0,
    slow_interval_s: float = 10.0,
    retry_interval_s: float = 5.0,
    keep_samples: int = 300,
    keep_events: int = 1000,
    disk_path: str = "/",
) -> NodeAgent:
    """A node agent that is not started yet.

    ``slow_interval_s`` is how often figures that change rarely are read, ``retry_interval_s`` how often a
    driver that is not there is looked for.
    """
    return NodeAgent(
        node_id,
        GpuReader(slow_interval_s=slow_interval_s, retry_interval_s=retry_interval_s),
        functools.partial(EventWatcher, retry_interval_s=retry_interval_s),
        interval_s=interval_s,
        keep_samples=keep_samples,
        keep_events=keep_events,
        disk_path=disk_path,
    )
