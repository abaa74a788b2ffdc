"""Whatever is observed: targets stay inside their bounds, and unknown signals never scale down."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.autoscaling.capacity import (
    EngineObservation,
    EngineSpeed,
    LatencyBounds,
    ReplicaCapacity,
)
from controlplane.core.autoscaling.decision import TierObservation
from controlplane.core.autoscaling.gpu_budget import GpuDemand, share_gpus
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.domain.request import RequestShape
from controlplane.core.telemetry.series import Freshness, Signal, known_now, missing

SPEED = EngineSpeed(0.02, 0.001, 0.0001)
REQUEST = RequestShape(500.0, 100.0)

amounts = st.one_of(st.just(0.0), st.floats(0.0, 1e5))
signals = st.one_of(
    st.builds(known_now, amounts),
    st.builds(lambda value: Signal(Freshness.STALE, value, 9.0, "old"), amounts),
    st.just(missing("gone")),
)
ticks = st.lists(
    st.tuples(signals, signals, signals, st.floats(0.1, 400.0), st.floats(0, 1e4), st.floats(0, 1e4)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    ticks,
    st.integers(0, 4),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 5)),
    st.floats(0.0, 600.0),
)
def test_targets_stay_inside_bounds_and_steps(
    ticks: list[tuple[Signal, Signal, Signal, float, float, float]],
    lowest: int,
    extra: int,
    step: int | None,
    cool_down_s: float,
) -> None:
    highest = max(lowest + extra, 1)
    rule = ScalingRule(
        "t",
        SPEED,
        REQUEST,
        min_replicas=lowest,
        max_replicas=highest,
        step_up=step,
        step_down=step,
        cool_down_up_s=cool_down_s,
        cool_down_down_s=cool_down_s,
    )
    scaler = TierScaler(rule)
    target, now_s = lowest, 0.0
    for arrivals, in_flight, queued, interval_s, finished, missed in ticks:
        now_s += interval_s
        seen = TierObservation(
            "t", now_s, now_s, target, target, interval_s, arrivals, in_flight, queued,
            finished=finished, missed=min(missed, finished),
        )  # fmt: skip
        decision = scaler.decide(seen)
        assert lowest <= decision.target <= highest
        assert decision.reason
        if step is not None:
            assert abs(decision.target - target) <= step
        if any(signal.freshness is not Freshness.FRESH for signal in (arrivals, in_flight, queued)):
            assert decision.target >= target
        target = decision.target


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 1e5), st.floats(0.0, 500.0), st.floats(0.0, 1.5)),
        max_size=50,
    )
)
def test_no_reading_makes_the_capacity_absurd(readings: list[tuple[float, float, float, float]]) -> None:
    capacity = ReplicaCapacity(SPEED)
    for generated, prompted, batch, busy in readings:
        capacity.observe(EngineObservation(generated, prompted, batch, busy), 5.0)
        speed = capacity.speed
        assert speed.step_s > 0
        assert speed.step_s_per_sequence > 0
        assert speed.prompt_s_per_token > 0
    assert capacity.replicas(5.0, REQUEST, LatencyBounds(16.0)) >= 1


demands = st.lists(
    st.builds(
        GpuDemand,
        gpus_per_replica=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
        lowest=st.integers(0, 3),
        wanted=st.integers(0, 12),
        priority=st.integers(0, 3),
        gains=st.lists(st.floats(0.0, 50.0), max_size=12).map(tuple),
        ordered=st.integers(0, 12),
        reserved=st.sampled_from([0, 0, 0, 2]),
        running=st.integers(0, 4),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(demands, st.floats(0.0, 40.0))
def test_no_gpu_is_granted_twice_and_none_is_left_that_would_be_used(
    demands: list[GpuDemand], gpus: float
) -> None:
    granted = share_gpus(demands, gpus)
    used = sum(d.gpus_per_replica * count for d, count in zip(demands, granted, strict=True))
    certain = sum(d.gpus_per_replica * d.certain for d in demands)
    first = max((d.priority for d in demands if d.lacking), default=None)
    waits = 0.0
    for demand, count in zip(demands, granted, strict=True):
        assert demand.certain <= count <= demand.wanted
        assert count >= min(demand.running, demand.lowest, demand.wanted)
        if demand.priority == first:
            assert count >= demand.floor
            if count == demand.floor:
                waits += demand.gpus_per_replica * max(0, demand.floor - demand.certain)
    assert used <= max(gpus, certain) + waits + 1e-6
    for demand, count in zip(demands, granted, strict=True):
        assert count == demand.wanted or demand.gpus_per_replica > gpus - used - 1e-6
