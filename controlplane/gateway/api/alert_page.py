"""``GET /alerts``: what fires, as the controller last said."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from controlplane.core.cluster.snapshot import ClusterSnapshot


def alerts(snapshot: ClusterSnapshot | None) -> dict[str, Any]:
    """Alerts that fire, the worst first. ``snapshot`` is None while no controller has been heard of: then
    nothing is known, which is not the same as nothing wrong."""
    if snapshot is None:
        return {"known": False, "snapshot": None, "alerts": []}
    return {
        "known": not snapshot.warming,
        "snapshot": {"epoch": snapshot.epoch, "version": snapshot.version, "unix_s": snapshot.unix_s},
        "alerts": [asdict(alert) for alert in snapshot.alerts],
    }
