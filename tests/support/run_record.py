"""What `tierplane up` notes of a plane that it started."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import psutil

from controlplane.ray_cluster.session import RunRecord


def run_record(plane_id: str = "no-such-plane", **fields: Any) -> RunRecord:
    """Of a plane whose `up` is this process."""
    base = RunRecord(
        plane_id=plane_id,
        config="/etc/plane.yaml",
        applications=("tierplane",),
        namespace="tierplane",
        up_pid=os.getpid(),
        up_created_unix_s=psutil.Process().create_time(),
        started_unix_s=time.time(),
        owns_ray=True,
    )
    return replace(base, **fields)
