"""What gateways show of alerts: ``GET /alerts`` and metrics, from the snapshot."""

from __future__ import annotations

import time
from typing import Any

from controlplane.core.alerts.alert import Severity, SubjectType
from controlplane.core.alerts.views import FiringAlert
from controlplane.core.cluster.snapshot import ClusterSnapshot
from tests.support.gateway import Rig, plane, running

DOWN = FiringAlert(
    "TierplaneTierDown",
    Severity.CRITICAL,
    SubjectType.TIER,
    "balanced",
    "It is down.",
    "Look.",
    1000.0,
    "ada",
)


def say(rig: Rig, *alerts: FiringAlert, due: int = 2) -> None:
    rig.version += 1
    snapshot = ClusterSnapshot(
        "epoch", rig.version, time.time(), alerts=alerts, due=(("balanced", due), ("gone", 1))
    )
    rig.gateway.apply(snapshot)


async def metrics(rig: Rig) -> str:
    async with rig.client.get(f"{rig.base}/metrics") as response:
        return await response.text()


async def test_a_firing_alert_is_shown_until_it_is_resolved() -> None:
    async with running() as rig:
        assert await rig.get("/alerts") == (200, {"known": False, "snapshot": None, "alerts": []})
        say(rig, DOWN)
        status, value = await rig.get("/alerts")
        assert (status, value["known"]) == (200, True)
        assert value["alerts"] == [
            {
                "rule": "TierplaneTierDown",
                "severity": "critical",
                "kind": "tier",
                "subject": "balanced",
                "summary": "It is down.",
                "action": "Look.",
                "since_unix_s": 1000.0,
                "acknowledged": "ada",
                "silenced": False,
                "state": "firing",
            }
        ]
        line = 'alert="TierplaneTierDown",severity="critical",subject="balanced"} 1.0'
        assert line in await metrics(rig)
        say(rig)
        assert (await rig.get("/alerts"))[1]["alerts"] == []
        assert "tierplane_alerts{" not in await metrics(rig)


async def test_replicas_due_are_the_controllers_or_else_the_configurations() -> None:
    async with running(plane({"name": "balanced", "replicas": 3})) as rig:
        assert 'tierplane_due_replicas{gateway="gateway-a",tier="balanced"} 3.0' in await metrics(rig)
        say(rig, due=0)
        text = await metrics(rig)
        assert 'tierplane_due_replicas{gateway="gateway-a",tier="balanced"} 0.0' in text
        assert 'tier="gone"' not in text


async def test_each_tiers_slo_target_is_a_metric() -> None:
    tiers: list[dict[str, Any]] = [{"name": "balanced", "slo": {"attainment": 0.95}}, {"name": "capable"}]
    async with running(plane(*tiers)) as rig:
        text = await metrics(rig)
        assert 'tierplane_slo_target_ratio{gateway="gateway-a",tier="balanced"} 0.95' in text
        assert 'tierplane_slo_target_ratio{gateway="gateway-a",tier="capable"} 0.99' in text
