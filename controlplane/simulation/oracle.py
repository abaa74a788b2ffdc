"""Policies that know the trace in advance: the static peak and the oracle.

The oracle knows every arrival, every length and the engines' true speed. For each slot of time it computes
how many replicas the requests in flight need, orders them one cold start ahead, and retains a replica during
a lull that is shorter than a new start would take. The only free parameter is a factor for fluctuations
within a slot; a search finds the smallest factor that attains the goal in the simulation. The result is the
best of this family of plans, not a proven optimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from controlplane.core.autoscaling.capacity import LatencyBounds, ReplicaCapacity, linear_speed
from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.core.domain.request import RequestShape
from controlplane.simulation.policies import PolicyInput, StaticPolicy, decision, per_tier
from controlplane.simulation.results import SimulationResult
from controlplane.simulation.scenario import Scenario, TierScenario
from controlplane.simulation.simulator import replay
from controlplane.simulation.trace_rows import Arrival

SLOT_S: Final = 10.0
"""Width of the plan's slots of time."""
_SEARCH_STEPS: Final = 7
_FACTORS: Final = (0.5, 3.0)
"""Range of the factors that are tried."""


def mean_request(arrivals: Sequence[Arrival]) -> RequestShape:
    """Mean lengths of the requests."""
    count = max(len(arrivals), 1)
    return RequestShape(
        max(sum(arrival.input_tokens for arrival in arrivals) / count, 1.0),
        max(sum(arrival.output_tokens for arrival in arrivals) / count, 1.0),
    )


def needed_replicas(arrivals: Sequence[Arrival], tier: TierScenario) -> list[float]:
    """Replicas that the requests need in each slot, as real numbers.

    A request's work is spread over the slots in which it would run on a loaded replica.
    """
    if not arrivals:
        return [0.0]
    request = mean_request(arrivals)
    model = tier.replica
    timing = model.engine.timing
    capacity = ReplicaCapacity(linear_speed(timing.step_s, timing.prompt_s, request, model.concurrency_limit))
    bounds = LatencyBounds(float(model.concurrency_limit), tier.rule.slo.itl_s)
    sequences = capacity.most_sequences(request, bounds)
    # A fully loaded replica generates a token for each sequence every ``itl_s``.
    itl_s = capacity.itl_s(sequences, request)
    speed = capacity.speed
    length = int(arrivals[-1].at_s // SLOT_S) + 1
    needed = [0.0] * length
    for arrival in arrivals:
        runs_s = arrival.input_tokens * speed.prompt_s_per_token + arrival.output_tokens * itl_s
        begin, left_s = arrival.at_s, runs_s
        while left_s > 0:
            slot = int(begin // SLOT_S)
            if slot >= length:
                break
            part_s = min(left_s, (slot + 1) * SLOT_S - begin)
            needed[slot] += part_s / SLOT_S / sequences
            begin += max(part_s, 1e-6)
            left_s -= part_s
    return needed


def plan(needed: Sequence[float], factor: float, cold_start_s: float, lowest: int, highest: int) -> list[int]:
    """Ordered replicas in each slot. The k-th replica is ordered one cold start before it is needed, and
    retained during short lulls."""
    counts = [min(max(math.ceil(value * factor - 1e-9), lowest), highest) for value in needed]
    ahead = math.ceil(cold_start_s / SLOT_S)
    ordered = [0] * len(counts)
    for k in range(1, max(counts, default=0) + 1):
        last = -(10**9)
        for slot, count in enumerate(counts):
            if count < k:
                continue
            # Retaining a replica costs the lull, a new start costs one cold start.
            since = last + 1 if slot - last - 1 <= ahead else slot - ahead
            for covered in range(max(since, 0), slot + 1):
                ordered[covered] = max(ordered[covered], k)
            last = slot
    return ordered


class PlannedPolicy:
    """Follows a plan."""

    period_s = SLOT_S / 2

    def __init__(self, ordered: Sequence[int]) -> None:
        self._ordered = ordered

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        """The planned number for now."""
        slot = min(int((tier.observation.now_s + SLOT_S / 2) // SLOT_S), len(self._ordered) - 1)
        return decision(tier, self._ordered[slot], "the plan")


def static_peak(arrivals: Sequence[Arrival], tier: TierScenario) -> int:
    """Replicas for the busiest minute."""
    needed = needed_replicas(arrivals, tier)
    width = round(60.0 / SLOT_S)
    total = sum(needed[:width])
    most = total
    for index in range(width, len(needed)):
        total += needed[index] - needed[index - width]
        most = max(most, total)
    bounds = tier.rule
    return min(
        max(math.ceil(most / min(width, len(needed)) - 1e-9), bounds.min_replicas, 1), bounds.max_replicas
    )


def beginning_with(scenario: Scenario, replicas: int) -> Scenario:
    """The same scenario, with another number of replicas of each tier at the beginning."""
    return replace(scenario, tiers=tuple(replace(tier, replicas=replicas) for tier in scenario.tiers))


def run_static(scenario: Scenario, arrivals: Sequence[Arrival], share: float = 1.0) -> SimulationResult:
    """Run a scenario that has one tier with ``share`` of the static peak."""
    count = max(1, math.ceil(share * static_peak(arrivals, scenario.tiers[0]) - 1e-9))
    return replay(
        beginning_with(scenario, count), per_tier(lambda _: StaticPolicy(count)), arrivals, "static"
    )


def run_oracle(scenario: Scenario, arrivals: Sequence[Arrival], attainment: float) -> SimulationResult:
    """Run a scenario that has one tier with the cheapest plan that attains the goal or, if none does, with
    the largest factor."""
    tier = scenario.tiers[0]
    needed = needed_replicas(arrivals, tier)
    low, high = _FACTORS

    def attempt(factor: float) -> SimulationResult:
        ordered = plan(
            needed, factor, tier.replica.cold_start_s, tier.rule.min_replicas, tier.rule.max_replicas
        )
        start = beginning_with(scenario, ordered[0])
        return replay(start, per_tier(lambda _: PlannedPolicy(ordered)), arrivals, "oracle")

    best = attempt(high)
    if best.attainment < attainment:
        return best
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        result = attempt(middle)
        if result.attainment >= attainment:
            high = middle
            if result.gpu_hours <= best.gpu_hours:
                best = result
        else:
            low = middle
    return best
