"""``GET /alerts``: the alerts that fire, by the controller's last snapshot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from controlplane.core.cluster.snapshot import ClusterSnapshot


def alerts(snapshot: ClusterSnapshot | None) -> dict[str, Any]:
    """Alerts that fire, the worst first. ``snapshot`` is None until the controller's first one came: then
    ``known`` is false, as an empty list does not mean that nothing is wrong."""
    if snapshot is None:
        return {"known": False, "snapshot": None, "alerts": []}
    return {
        "known": not snapshot.warming,
        "snapshot": {"epoch": snapshot.epoch, "version": snapshot.version, "unix_s": snapshot.unix_s},
        "alerts": [asdict(alert) for alert in snapshot.alerts],
    }
