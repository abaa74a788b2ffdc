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
    """A node agent that is not started yet.

    ``slow_interval_s`` is how often the values that rarely change are read, ``retry_interval_s`` how often to
    retry a driver that does not respond.
    """
    return NodeAgent(
        node_id,
        GpuReader(slow_interval_s=slow_interval_s, retry_interval_s=retry_interval_s),
        functools.partial(EventWatcher, retry_interval_s=retry_interval_s),
        interval_s=interval_s,
    )
