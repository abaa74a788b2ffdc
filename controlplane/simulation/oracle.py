"""Policies that know the trace beforehand: the static peak and the oracle.

The oracle knows every arrival, every length and the engines' true speed. For each slot of time it computes
how many replicas the requests in flight need, orders them one cold start ahead, and keeps a replica through a
lull that is shorter than a new start would take. One number is left, the share of slack it keeps for
fluctuations inside a slot: it is the smallest of a search that attains the goal in the simulation itself. It
is the best of this family of plans, not a proof of the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from controlplane.core.autoscaling.capacity import EngineSpeed, LatencyBounds, ReplicaCapacity, RequestShape
from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.simulation.engine import EngineTiming
from controlplane.simulation.policies import StaticPolicy, decision, each
from controlplane.simulation.results import SimulationResult
from controlplane.simulation.simulator import PolicyInput, Scenario, TierScenario, replay
from controlplane.simulation.traces import Arrival

SLOT_S: Final = 10.0
_SEARCH: Final = 7
_FACTORS: Final = (0.5, 3.0)


def true_speed(timing: EngineTiming, request: RequestShape, batch: int) -> EngineSpeed:
    """The engine's real speed as the capacity model's three figures."""
    context = request.input_tokens + request.output_tokens / 2
    one, many = timing.step_s(1, context), timing.step_s(max(batch, 2), context)
    slope = max((many - one) / (max(batch, 2) - 1), 1e-9)
    prompt = max(round(request.input_tokens), 1)
    return EngineSpeed(max(one - slope, 1e-9), slope, timing.prompt_s(prompt) / prompt)


def mean_request(arrivals: Sequence[Arrival]) -> RequestShape:
    """The mean request."""
    count = max(len(arrivals), 1)
    return RequestShape(
        max(sum(arrival.input_tokens for arrival in arrivals) / count, 1.0),
        max(sum(arrival.output_tokens for arrival in arrivals) / count, 1.0),
    )


def demand(arrivals: Sequence[Arrival], tier: TierScenario) -> list[float]:
    """Replicas that the work of each slot takes, as a real number.

    A request's work is spread over the slots in which it would run on a loaded replica.
    """
    if not arrivals:
        return [0.0]
    request = mean_request(arrivals)
    model = tier.replica
    capacity = ReplicaCapacity(true_speed(model.engine.timing, request, model.concurrency_limit))
    bounds = LatencyBounds(float(model.concurrency_limit), tier.rule.slo.itl_s)
    slots = capacity.most_sequences(request, bounds)
    # With all its slots taken, a replica gives each sequence a token every ``itl_s``.
    itl_s = capacity.itl_s(slots, request)
    speed = capacity.speed
    length = int(arrivals[-1].at_s // SLOT_S) + 1
    needed = [0.0] * length
    for arrival in arrivals:
        hold_s = arrival.input_tokens * speed.prompt_s_per_token + arrival.output_tokens * itl_s
        begin, left_s = arrival.at_s, hold_s
        while left_s > 0:
            slot = int(begin // SLOT_S)
            if slot >= length:
                break
            part_s = min(left_s, (slot + 1) * SLOT_S - begin)
            needed[slot] += part_s / SLOT_S / slots
            begin += max(part_s, 1e-6)
            left_s -= part_s
    return needed


def plan(needed: Sequence[float], factor: float, cold_start_s: float, lowest: int, highest: int) -> list[int]:
    """Replicas to have ordered in each slot: the k-th as long as it is needed, through short lulls, and from
    one cold start before."""
    counts = [min(max(math.ceil(value * factor - 1e-9), lowest), highest) for value in needed]
    ahead = math.ceil(cold_start_s / SLOT_S)
    ordered = [0] * len(counts)
    for k in range(1, max(counts, default=0) + 1):
        last = -(10**9)
        for slot, count in enumerate(counts):
            if count < k:
                continue
            # A lull costs the idle replica; a new start costs one cold start of it.
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

    def decide(self, seen: PolicyInput) -> ScalingDecision:
        """What the plan says of now."""
        slot = min(int((seen.observation.now_s + SLOT_S / 2) // SLOT_S), len(self._ordered) - 1)
        return decision(seen, self._ordered[slot], "the plan")


def static_peak(arrivals: Sequence[Arrival], tier: TierScenario, window_s: float = 60.0) -> int:
    """Replicas for the busiest minute."""
    needed = demand(arrivals, tier)
    width = max(1, round(window_s / SLOT_S))
    total = sum(needed[:width])
    most = total
    for index in range(width, len(needed)):
        total += needed[index] - needed[index - width]
        most = max(most, total)
    bounds = tier.rule
    return min(
        max(math.ceil(most / min(width, len(needed)) - 1e-9), bounds.min_replicas, 1), bounds.max_replicas
    )


def at_replicas(scenario: Scenario, counts: Callable[[TierScenario], int]) -> Scenario:
    """The same scenario that begins with other numbers of replicas."""
    return replace(scenario, tiers=tuple(replace(tier, replicas=counts(tier)) for tier in scenario.tiers))


def run_static(scenario: Scenario, arrivals: Sequence[Arrival], share: float = 1.0) -> SimulationResult:
    """The static peak of a scenario with one tier, or that share of it."""
    count = max(1, math.ceil(share * static_peak(arrivals, scenario.tiers[0]) - 1e-9))
    begun = at_replicas(scenario, lambda _: count)
    return replay(begun, each(lambda _: StaticPolicy(count)), arrivals, "static")


def run_oracle(scenario: Scenario, arrivals: Sequence[Arrival], attainment: float) -> SimulationResult:
    """The cheapest plan found that attains the goal, for a scenario with one tier; if none does, the one
    that attains most."""
    tier = scenario.tiers[0]
    needed = demand(arrivals, tier)
    low, high = _FACTORS

    def attempt(factor: float) -> SimulationResult:
        ordered = plan(
            needed,
            factor,
            tier.replica.cold_start_s,
            tier.rule.min_replicas,
            tier.rule.max_replicas,
        )
        begun = at_replicas(scenario, lambda _: ordered[0])

        return replay(begun, each(lambda _: PlannedPolicy(ordered)), arrivals, "oracle")

    best = attempt(high)
    if best.attainment < attainment:
        return best
    for _ in range(_SEARCH):
        middle = (low + high) / 2
        result = attempt(middle)
        if result.attainment >= attainment:
            high = middle
            if result.gpu_hours <= best.gpu_hours:
                best = result
        else:
            low = middle
    return best
