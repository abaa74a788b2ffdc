"""``GET /alerts``: the firing alerts, from the controller's last snapshot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from controlplane.core.cluster.snapshot import ClusterSnapshot


def alerts(snapshot: ClusterSnapshot | None) -> dict[str, Any]:
    """The firing alerts, most severe first.

    ``known`` is false while the controller has sent no snapshot (``snapshot`` is None) or is still warming
    up: an empty list then does not mean that all is well.
    """
    if snapshot is None:
        return {"known": False, "snapshot": None, "alerts": []}
    return {
        "known": not snapshot.warming,
        "snapshot": {"epoch": snapshot.epoch, "version": snapshot.version, "unix_s": snapshot.unix_s},
        "alerts": [asdict(alert) for alert in snapshot.alerts],
    }
