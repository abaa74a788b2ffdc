"""The scaling policies a simulation can run: tierplane's own, and others for comparison.

* ``tierplane``: :class:`controlplane.core.autoscaling.round.ScalingRound`, the production code: all tiers
  together, inside the GPUs that there are. Of the others each tier has one of its own.
* ``static``: as many replicas as the trace's busiest minute needs, from beginning to end.
* ``hpa``: Kubernetes' HorizontalPodAutoscaler on GPU utilisation, with its documented algorithm and defaults.
* ``hpa-slots``: the same on the used share of the concurrency limit, a better signal than utilisation, which
  is near 1 as soon as anything runs.
* ``kpa``: Knative's autoscaler on concurrency, stable and panic windows.
* ``serve``: Ray Serve's default policy, its own code, with the target set to 70 % of the concurrency limit.
* ``serve-default``: the same with Serve's default target of 2 requests a replica.
* ``oracle``: knows every arrival of the future and the true speed, see :mod:`.oracle`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.round import ScalingRound
from controlplane.simulation.simulator import MakePolicy, PolicyInput, Scenario, TierScenario

TARGET_RATIO: Final = 0.7
"""Of the concurrency limit; Knative's default utilisation target."""
TARGETS: Final = {
    "static": 1.0, "hpa": 0.8, "hpa-slots": TARGET_RATIO, "kpa": TARGET_RATIO, "serve": TARGET_RATIO,
}  # fmt: skip
"""What a baseline aims at, where it has one number to set: the share of the busiest minute's replicas, of the
GPU's time, or of the concurrency limit."""


def decision(seen: PolicyInput, target: int, reason: str) -> ScalingDecision:
    """A baseline's decision."""
    observation = seen.observation
    return ScalingDecision(observation.tier, observation.target, target, reason, requested=target)


class TierplanePolicy:
    """The production policy."""

    def __init__(self, scenario: Scenario) -> None:
        self.period_s = min(tier.rule.tick_s for tier in scenario.tiers)
        self._round = ScalingRound(tier.rule for tier in scenario.tiers)

    def decide(self, seen: Sequence[PolicyInput], gpus: float | None) -> tuple[ScalingDecision, ...]:
        """What production would decide."""
        return self._round.decide([tier.observation for tier in seen], gpus)

    def learned(self, tier: str) -> TierScaler | None:
        """What production would base recommendations on."""
        return self._round.scaler(tier)


class OneTierPolicy(Protocol):
    """Decides how many replicas one tier has, and knows nothing of the others."""

    period_s: float

    def decide(self, seen: PolicyInput) -> ScalingDecision:
        """The target from now on."""


class _PolicyPerTier:
    """A policy for each tier, side by side. Nobody shares GPUs out: replicas that find none wait."""

    def __init__(self, policies: Sequence[OneTierPolicy]) -> None:
        self.period_s = min(policy.period_s for policy in policies)
        self._policies = policies

    def decide(self, seen: Sequence[PolicyInput], gpus: float | None) -> tuple[ScalingDecision, ...]:
        """What each of them decides."""
        return tuple(policy.decide(tier) for tier, policy in zip(seen, self._policies, strict=True))

    def learned(self, tier: str) -> TierScaler | None:
        """None of them asks how fast an engine is."""
        return None


def each(make: Callable[[TierScenario], OneTierPolicy]) -> MakePolicy:
    """The maker of a policy that has one of ``make``'s for each tier."""
    return lambda scenario: _PolicyPerTier([make(tier) for tier in scenario.tiers])


class StaticPolicy:
    """Always the same number."""

    period_s = 60.0

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def decide(self, seen: PolicyInput) -> ScalingDecision:
        """That number."""
        return decision(seen, self.replicas, "static")


class HpaPolicy:
    """Kubernetes: ``ceil(current * metric / target)`` every 15 s, unless inside the tolerance of 10 %;
    up by at most 4 pods or 100 % in 15 s, down to the highest desired of the last 300 s."""

    period_s = 15.0

    def __init__(self, tier: TierScenario, metric: Callable[[PolicyInput], float], target: float) -> None:
        self._lowest, self._highest = max(tier.rule.min_replicas, 1), tier.rule.max_replicas
        self._metric = metric
        self._target = target
        self._recent_desired: deque[tuple[float, int]] = deque()

    def decide(self, seen: PolicyInput) -> ScalingDecision:
        """The controller's next step."""
        now_s = seen.observation.now_s
        current, ready = seen.observation.target, max(seen.observation.ready, 1)
        ratio = self._metric(seen) / self._target
        # Pods that are not ready count as idle on the way up: then they must not be multiplied again.
        if ratio > 1.0:
            ratio = max(1.0, ratio * ready / max(current, 1))
            desired = current if ratio <= 1.1 else math.ceil(current * ratio - 1e-9)
        else:
            desired = current if ratio >= 0.9 else math.ceil(ready * ratio - 1e-9)
        desired = min(max(desired, self._lowest), self._highest)
        desired = min(desired, max(current + 4, 2 * current))
        self._recent_desired.append((now_s, desired))
        while self._recent_desired[0][0] < now_s - 300.0:
            self._recent_desired.popleft()
        target = (
            desired if desired > current else min(current, max(entry[1] for entry in self._recent_desired))
        )
        return decision(seen, target, f"{ratio:.2f} of the target")


class KpaPolicy:
    """Knative: concurrency over 60 s and, in a panic, over 6 s; a panic begins at twice the capacity, never
    scales down, and lasts 60 s past its last cause."""

    period_s = 2.0

    def __init__(self, tier: TierScenario, target: float) -> None:
        self._lowest, self._highest = max(tier.rule.min_replicas, 1), tier.rule.max_replicas
        self._target = tier.replica.concurrency_limit * target
        self._recent: deque[tuple[float, float]] = deque()
        self._panic_s = -math.inf
        self._panic_target = 0

    def decide(self, seen: PolicyInput) -> ScalingDecision:
        """The autoscaler's next step."""
        now_s = seen.observation.now_s
        self._recent.append((now_s, seen.ongoing))
        while self._recent[0][0] <= now_s - 60.0:
            self._recent.popleft()
        stable = sum(value for _, value in self._recent) / len(self._recent)
        last = [value for at_s, value in self._recent if at_s > now_s - 6.0]
        panic = sum(last) / len(last)
        ready = max(seen.observation.ready, 1)
        # At most 1000 times as many up, at most halved down.
        want_stable = min(max(math.ceil(stable / self._target), ready // 2), 1000 * ready)
        want_panic = min(max(math.ceil(panic / self._target), ready // 2), 1000 * ready)
        if want_panic / ready >= 2.0:
            if now_s - self._panic_s > 60.0:
                self._panic_target = 0
            self._panic_s = now_s
        want = want_stable
        why = f"{stable:.1f} at once over 60 s"
        if now_s - self._panic_s <= 60.0:
            self._panic_target = want = max(self._panic_target, want_panic, want_stable)
            why = f"panic: {panic:.1f} at once over 6 s"
        return decision(seen, min(max(want, self._lowest), self._highest), why)


class ServePolicy:
    """Ray Serve's default policy: the functions of the installed ``ray.serve.autoscaling_policy``.

    They are called in the order in which Serve's own wrapper calls them, with the virtual clock's time in
    place of ``time.time()``; then come Serve's bounds. Requests are averaged over ``look_back_period_s``.
    """

    period_s = 1.0

    def __init__(self, tier: TierScenario, target_ongoing_requests: float | None = None) -> None:
        from ray.serve import autoscaling_policy
        from ray.serve._private.common import DeploymentID
        from ray.serve.config import AutoscalingConfig, AutoscalingContext

        options: dict[str, Any] = {}
        if target_ongoing_requests is not None:
            options["target_ongoing_requests"] = target_ongoing_requests
        self._config = AutoscalingConfig(
            min_replicas=max(tier.rule.min_replicas, 1), max_replicas=tier.rule.max_replicas, **options
        )
        self._module = autoscaling_policy
        self._context = AutoscalingContext
        self._id = DeploymentID(tier.policy.name)
        self._state: dict[str, Any] = {}
        self._recent: deque[tuple[float, float]] = deque()

    def decide(self, seen: PolicyInput) -> ScalingDecision:
        """Serve's next step."""
        now_s = seen.observation.now_s
        config = self._config
        self._recent.append((now_s, seen.ongoing))
        while self._recent[0][0] <= now_s - config.look_back_period_s:
            self._recent.popleft()
        requests = sum(value for _, value in self._recent) / len(self._recent)
        ready, target = seen.observation.ready, seen.observation.target
        context = self._context(
            deployment_id=self._id,
            deployment_name=self._id.name,
            app_name=self._id.app_name,
            current_num_replicas=ready,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=requests,
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=config.min_replicas,
            capacity_adjusted_max_replicas=config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=config,
        )
        wanted, _ = self._module.replica_queue_length_autoscaling_policy(context)
        scaled = self._module._apply_scaling_factors(wanted, ready, config)
        final, self._state = self._module._apply_delay_logic(
            max(0, scaled), target, config, self._state, _now=now_s
        )
        bounded = min(max(final, config.min_replicas), config.max_replicas)
        return decision(seen, bounded, f"{requests:.1f} requests over {config.look_back_period_s:g} s")


def busy_ratio(seen: PolicyInput) -> float:
    """GPU utilisation."""
    return seen.busy_ratio


def slot_ratio(seen: PolicyInput) -> float:
    """Used share of the concurrency limit, what waits included."""
    return seen.ongoing / seen.slots if seen.slots else 1.0


NAMES: Final = (
    "tierplane", "static", "hpa", "hpa-slots", "kpa", "serve", "serve-default", "oracle",
)  # fmt: skip
"""All policies; ``static`` and ``oracle`` need to know the trace beforehand."""


def reactive_policy(name: str, target: float | None = None) -> MakePolicy:
    """The maker of a policy that needs to know nothing of the trace; ``target`` in place of the baseline's
    own of ``TARGETS``. KeyError: there is none."""
    if name == "tierplane":
        return TierplanePolicy
    if name == "serve-default":
        return each(ServePolicy)
    aim = TARGETS[name] if target is None else target
    makers: dict[str, Callable[[TierScenario], OneTierPolicy]] = {
        "hpa": lambda tier: HpaPolicy(tier, busy_ratio, aim),
        "hpa-slots": lambda tier: HpaPolicy(tier, slot_ratio, aim),
        "kpa": lambda tier: KpaPolicy(tier, aim),
        "serve": lambda tier: ServePolicy(tier, tier.replica.concurrency_limit * aim),
    }
    return each(makers[name])
