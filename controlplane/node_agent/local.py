"""The node agent of this machine, with the GPUs of its NVIDIA driver."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from controlplane.node_agent.agent import NodeAgent
from controlplane.node_agent.nvml.events import EventWatcher
from controlplane.node_agent.nvml.reader import GpuReader
from controlplane.paths import run_dir


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
        disk_paths=disk_paths(),
    )


def disk_paths() -> tuple[str, ...]:
    """The folders whose file systems may fill up: the run folder, temporary files, and models."""
    run = run_dir()
    models = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folders = (run, Path(tempfile.gettempdir()), models)
    # A folder that does not exist yet will be created on the file system of the nearest one above it.
    return tuple(str(next(each for each in (path, *path.parents) if each.exists())) for path in folders)
