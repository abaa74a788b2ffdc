"""Scaling in the controller without Ray: from a gateway's counters to targets that Serve follows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.config.scaling import ControllerScalingConfig, ScalingConfig
from controlplane.controller.scaling import PlaneScaler
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.json_values import StoredState
from controlplane.core.recommendations.views import as_json_value
from controlplane.core.reconcile.commands import ActionOutcome
from controlplane.core.traffic.counters import LATENCY_BOUNDS_S, TrafficCounters
from controlplane.planning.tier_specs import tier_specs
from tests.support.controller import HEARTBEAT_S, World
from tests.support.gateway import plane

GPUS = [f"n1-gpu{i}" for i in range(8)]
TIER: dict[str, Any] = {
    "name": "small",
    "engine_args": {"itl_ms": 20, "ttft_ms": 10, "gpus": 1},
    "concurrency_limit": 4,
}
"""A replica holds a request of 30 tokens for 0.6 s, so it carries about 6 a second."""
HOLD_S = 0.6


class Live:
    """A plane of one tier and one gateway; one step is one second."""

    def __init__(self, scaling: dict[str, Any] | None, mode: str = "apply", **tier: Any) -> None:
        asked = None if scaling is None else ScalingConfig(**{"hold_s": 5.0, "cold_start_s": 3.0, **scaling})
        made = TierConfig.model_validate({"engine": "simulated", **TIER, **tier, "scaling": asked})
        self.specs = tier_specs(plane().model_copy(update={"tiers": [made]}))
        self.world = World({"n1": list(GPUS)}, {"small": made.replicas}, scaled={"small"} if asked else set())
        self.config = ControllerScalingConfig.model_validate(
            {"mode": mode, "tick_s": 1.0, "advice_interval_s": 10.0, "window_s": 20.0, "score_after_s": 20.0}
        )
        self.counted = TrafficCounters("small")
        self.silent = False
        self.connect()

    def connect(self) -> None:
        """Attach scaling to the world's controller, which may be a new one."""
        self.world.controller.declare(self.specs, HEARTBEAT_S)
        self.scaling = PlaneScaler(self.world.controller, self.config)

    def step(self, seconds: int, per_s: int, slow: bool = False) -> None:
        for _ in range(seconds):
            if not self.silent:
                self._count(per_s, slow)
                self.world.controller.gateway_report(GatewayInfo("g1", "n1", "", traffic=(self.counted,)))
            self.world.step()
            self.scaling.tick()

    def _count(self, per_s: int, slow: bool) -> None:
        slots = 4 * self.world.ready("small")
        flight = min(round(per_s * HOLD_S), slots)
        done = min(per_s, round(slots / HOLD_S))
        bucket = LATENCY_BOUNDS_S.index(5.0 if slow else 1.0)
        counts = tuple(n + done * (i == bucket) for i, n in enumerate(self.counted.latency_counts))
        self.counted = replace(
            self.counted,
            arrived=self.counted.arrived + per_s,
            judged=self.counted.judged + done,
            missed=self.counted.missed + (done if slow else 0),
            ok=self.counted.ok + done,
            generated_tokens=self.counted.generated_tokens + 30 * done,
            prompt_tokens=self.counted.prompt_tokens + 10 * done,
            latency_counts=counts,
            ttft_counts=counts,
            in_flight=flight,
            waiting=max(0, per_s - done) * 5,
        )

    @property
    def replicas(self) -> int:
        return self.world.ready("small")

    @property
    def target(self) -> int:
        return self.world.controller.base_targets()["small"]


def test_a_load_step_makes_a_tier_grow_and_shrink_again() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(30, per_s=3)
    assert live.replicas == 1
    live.step(40, per_s=16)
    assert 3 <= live.replicas <= 5
    live.step(120, per_s=1)
    assert live.replicas == 1
    assert live.world.kinds("small").count("scaled") >= 2


def test_mode_advise_changes_nothing_and_shows_what_it_would_do() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5}, mode="advise")
    live.step(60, per_s=16)
    assert live.replicas == live.target == 1
    (view,) = live.scaling.report().tiers
    assert (view.mode, view.replicas, view.target) == ("advise", 1, 1)
    assert view.wanted >= 3
    assert "requests" in view.reason


def test_a_tier_without_scaling_settings_stays_as_configured_in_mode_apply() -> None:
    live = Live(None)
    live.step(60, per_s=16)
    assert live.replicas == 1
    assert live.scaling.report().tiers[0].mode == "fixed"


def test_a_silent_gateway_never_shrinks_a_tier() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(60, per_s=16)
    before = live.replicas
    assert before >= 3
    live.silent = True
    live.step(120, per_s=0)
    assert live.replicas == before


def test_a_controllers_restart_never_shrinks_a_tier() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(60, per_s=16)
    before, checkpoint = live.replicas, live.scaling.checkpoint()
    live.world.start_controller("e2", settle_s=5.0)
    live.connect()
    live.scaling.restore(StoredState(checkpoint))
    live.step(30, per_s=16)
    assert live.replicas >= before
    # Nor does one that has lost its store: what runs is what there is to be.
    live.world.start_controller("e3", settle_s=5.0)
    live.connect()
    for _ in range(8):
        live.step(1, per_s=16)
        assert live.replicas >= before


def test_a_tier_sleeps_and_is_woken_by_a_request() -> None:
    live = Live({"min_replicas": 0, "max_replicas": 2, "idle_to_zero_s": 10.0})
    live.step(20, per_s=1)
    assert live.replicas == 1
    live.step(200, per_s=0)
    assert live.replicas == live.target == 0
    unchanged = GatewayInfo("g1", "n1", "", traffic=(live.counted,))
    assert not live.scaling.wakes(unchanged)
    asked = replace(live.counted, arrived=live.counted.arrived + 1)
    assert live.scaling.wakes(replace(unchanged, traffic=(asked,)))
    live.step(1, per_s=1)
    assert live.target == 1
    live.step(5, per_s=0)
    assert live.replicas == 1


def test_a_tier_that_begins_with_no_replica_stays_asleep_without_a_request() -> None:
    live = Live({"min_replicas": 0, "max_replicas": 2}, replicas=0)
    live.step(30, per_s=0)
    assert live.replicas == live.target == 0


def test_a_number_set_by_hand_wins_for_as_long_as_it_was_set() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(20, per_s=1)
    answer = live.scaling.scale("small", 3, 30.0, "a rush is coming")
    assert answer.outcome is ActionOutcome.DONE
    assert live.scaling.scale("small", 3, 30.0, "a rush is coming").outcome is ActionOutcome.UNCHANGED
    live.step(10, per_s=1)
    assert live.replicas == 3
    assert live.scaling.report().tiers[0].mode == "by hand"
    live.step(60, per_s=1)
    assert live.replicas == 1, "its time is over"
    live.scaling.scale("small", 2, None, "")
    live.step(60, per_s=0)
    assert live.replicas == 2
    assert live.scaling.scale("small", None, None, "").outcome is ActionOutcome.DONE
    assert live.scaling.scale("small", None, None, "").outcome is ActionOutcome.UNCHANGED
    live.step(60, per_s=0)
    assert live.replicas == 1


def test_an_override_applies_in_mode_advise_too_and_survives_a_restart() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5}, mode="advise")
    live.step(20, per_s=1)
    live.scaling.scale("small", 4, None, "tests")
    live.step(10, per_s=1)
    assert live.replicas == 4
    checkpoint = live.scaling.checkpoint()
    live.world.start_controller("e2", settle_s=5.0)
    live.connect()
    live.scaling.restore(StoredState(checkpoint))
    live.step(20, per_s=1)
    assert live.replicas == 4


@pytest.mark.parametrize(("tier", "replicas"), [("small", 6), ("small", -1), ("nobody", 1)])
def test_what_can_not_be_set_by_hand(tier: str, replicas: int) -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(5, per_s=1)
    answer = live.scaling.scale(tier, replicas, None, "")
    assert answer.outcome in {ActionOutcome.REFUSED, ActionOutcome.UNKNOWN}
    assert ("max_replicas" if tier == "small" else "there is small") in answer.reason


def test_from_apply_back_to_advise_ends_the_targets_of_the_scaling() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(60, per_s=16)
    assert live.replicas >= 3
    live.scaling.configure(live.config.model_copy(update={"mode": "advise"}))
    live.step(20, per_s=16)
    assert live.replicas == 1


def test_a_recommendation_is_issued_at_once_only_once_and_scored() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5}, mode="advise")
    live.step(30, per_s=2)
    assert not live.scaling.recommendations.issued
    live.step(15, per_s=2, slow=True)
    (given,) = live.scaling.recommendations.issued
    assert given.recommendation.kind == "scale_up"
    assert "keep the SLO, under 99%" in given.recommendation.reasons[0]
    assert given.applied is None
    live.step(30, per_s=2, slow=True)
    first = live.scaling.recommendations.issued[0]
    assert first.applied is False
    assert first.score is not None
    assert first.score.right, "the trouble that it named is still there"
    assert live.scaling.recommendations.record().judged == 1
    shown = as_json_value(live.scaling.report())
    assert shown["recommendations"][0]["type"] == "scale_up"
    assert shown["record"]["right"] == 1
    again = Live({"min_replicas": 1, "max_replicas": 5})
    again.scaling.restore(StoredState(json.loads(json.dumps(live.scaling.checkpoint()))))
    assert again.scaling.recommendations.issued == live.scaling.recommendations.issued


def test_recommendations_use_the_configured_window() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5}, mode="advise")
    live.scaling.configure(live.config.model_copy(update={"window_s": 600.0}))
    live.step(350, per_s=4)
    live.step(250, per_s=0)
    long = live.world.controller.traffic_figures(600.0)["small"]
    short = live.world.controller.traffic_figures(200.0)["small"]
    assert long.arrivals_per_s.fresh == pytest.approx(350 * 4 / 600, rel=0.02)
    assert short.arrivals_per_s.fresh == 0.0


def test_cold_starts_are_measured() -> None:
    live = Live({"cold_start_s": None})
    (spec,) = live.specs
    assert live.scaling.cold_start_s(spec) == 60.0
    live.step(5, per_s=1)
    (name,) = live.world.replicas
    replica = live.world.replicas[name]
    since = replica.endpoint.since_unix_s
    replica.endpoint = replace(replica.endpoint, started_unix_s=since - 21.0)
    live.step(2, per_s=1)
    # what was seen ready before is not measured again
    assert live.scaling.cold_start_s(spec) == 60.0
    fresh = Live({"cold_start_s": None})
    started = replace(replica.endpoint, started_unix_s=10.0, since_unix_s=31.0)
    fresh.world.controller.register(started)
    fresh.scaling.tick()
    assert fresh.scaling.cold_start_s(spec) == 24.0


def test_snapshots_carry_the_tiers_targets() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 5})
    live.step(30, per_s=3)
    registry = live.world.registry
    (shown,) = registry.snapshot(secrets=False).scaling
    assert (shown.tier, shown.target) == ("small", 1)
    assert registry.snapshot(secrets=False).target_replicas("small", 9) == 1
    assert registry.snapshot(secrets=False).target_replicas("other", 9) == 9
    version = registry.version
    live.step(5, per_s=3)
    assert registry.version == version, "what has not changed is not published again"


def test_with_no_gpu_left_no_tier_grows() -> None:
    live = Live({"min_replicas": 2, "max_replicas": 8}, replicas=2)
    live.step(60, per_s=30)
    assert live.target > 2
    live.world.controller.observe_nodes({"n1"})
    live.world.controller.observe_nodes(())
    live.scaling.tick()
    (found,) = live.scaling.report().tiers
    assert live.target == 2
    assert "0 GPUs are shared" in found.reason


def test_a_node_that_is_cordoned_counts_with_what_runs_there_and_one_that_is_drained_with_nothing() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 8})
    live.step(60, per_s=16)
    before = live.replicas
    assert 3 <= before < len(GPUS)
    operations = live.world.controller
    operations.cordon("n1", "new cables")
    live.step(40, per_s=60)
    (found,) = live.scaling.report().tiers
    assert live.target == live.replicas == before
    assert f"{before} GPUs are shared" in found.reason
    operations.drain("n1", "new cables")
    live.scaling.tick()
    (found,) = live.scaling.report().tiers
    assert "0 GPUs are shared" in found.reason


def test_after_a_restart_it_is_known_that_gpus_were_reported() -> None:
    live = Live({"min_replicas": 1, "max_replicas": 8})
    live.step(30, per_s=3)
    live.world.restart_controller(same_cluster=True)
    assert live.world.controller.usable_gpus() == 0.0, "no agent has reported yet"


def test_without_any_report_of_a_gpu_their_number_is_unknown() -> None:
    assert not GpuInventory().has_reported_gpus
