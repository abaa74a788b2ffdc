"""What ``/health`` and ``/status`` say about tiers that are drained, starting or at zero, and of when."""

from __future__ import annotations

import time

from controlplane.core.cluster.snapshot import ClusterSnapshot, TierMode, TierNote
from controlplane.core.domain.endpoint import EndpointState
from tests.support.endpoints import make_endpoint
from tests.support.gateway import running


async def test_a_tier_that_has_no_replicas_on_purpose_is_not_unhealthy() -> None:
    for mode, reason, status in (
        (TierMode.DRAINED, "drained by an operator: upgrade", "drained"),
        (TierMode.STARTING, "starts for the first time", "starting"),
    ):
        async with running() as rig:
            note = TierNote("balanced", mode, reason, 1_764_500_000.0)
            rig.gateway.apply(ClusterSnapshot("e", 1, time.time(), notes=(note,)))
            _, value = await rig.get("/health")
            tier = value["tiers"]["balanced"]
            assert tier["status"] == status
            assert tier["why"] == f"{reason} (since 2025-11-30 10:53:20 UTC)"
            assert "no replica has reported" not in value["why"]
            _, value = await rig.get("/status")
            assert value["modes"] == [
                {"tier": "balanced", "mode": mode.value, "reason": reason, "since_unix_s": 1_764_500_000.0}
            ]


async def test_a_drained_plane_is_healthy_and_a_starting_one_is_not_yet() -> None:
    async with running() as rig:
        names = [tier.name for tier in rig.gateway.config.tiers]
        for number, (mode, expected) in enumerate(((TierMode.DRAINED, 200), (TierMode.STARTING, 503)), 1):
            notes = tuple(TierNote(name, mode, mode.value, 0.0) for name in names)
            rig.gateway.apply(ClusterSnapshot("e", number, time.time(), notes=notes))
            status, _ = await rig.get("/health")
            assert status == expected


async def test_an_endpoint_without_reports_shows_for_how_long() -> None:
    async with running() as rig:
        endpoint = make_endpoint("balanced-1", EndpointState.READY)
        silent = (("balanced-1", time.time() - 7.5),)
        rig.gateway.apply(ClusterSnapshot("e", 1, time.time(), (endpoint,), silent=silent))
        _, value = await rig.get("/health")
        assert "balanced-1 has not reported for " in value["tiers"]["balanced"]["why"]
        _, value = await rig.get("/status")
        assert value["endpoints"][0]["silent_since_unix_s"] == silent[0][1]
