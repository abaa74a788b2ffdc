"""The node agent of this machine, with the GPUs of its NVIDIA driver."""

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
) -> NodeAgent:
    """A new node agent, not started yet.

    Values that rarely change are read every ``slow_interval_s``; a driver that does not respond is retried
    every ``retry_interval_s``.
    """
    return NodeAgent(
        node_id,
        GpuReader(slow_interval_s=slow_interval_s, retry_interval_s=retry_interval_s),
        functools.partial(EventWatcher, retry_interval_s=retry_interval_s),
        interval_s=interval_s,
    )
