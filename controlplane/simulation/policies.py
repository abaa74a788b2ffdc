"""The scaling policies that a simulation can run: tierplane's own, and others for comparison.

* ``tierplane``: :class:`controlplane.core.autoscaling.round.ScalingRound`, the production code, which scales
  all tiers together within the GPU budget. The other policies scale each tier separately.
* ``static``: as many replicas as the trace's busiest minute needs, throughout the run.
* ``hpa``: Kubernetes' HorizontalPodAutoscaler on GPU utilisation, with its documented algorithm and defaults.
* ``hpa-slots``: the same on the used share of the concurrency limit, a better signal than utilisation, which
  is near 1 as soon as anything runs.
* ``kpa``: Knative's autoscaler on concurrency, with stable and panic windows.
* ``serve``: Ray Serve's default policy, its own code, with the target set to 70 % of the concurrency limit.
* ``serve-default``: the same with Serve's default target of 2 requests per replica.
* ``oracle``: knows all arrivals and the engines' true speed in advance, see :mod:`.oracle`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from controlplane.core.autoscaling.decision import ScalingDecision, TierObservation
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.round import ScalingRound
from controlplane.simulation.scenario import Scenario, TierScenario

TARGET_RATIO: Final = 0.7
"""Share of the concurrency limit: Knative's default target utilisation."""
TARGETS: Final = {
    "static": 1.0, "hpa": 0.8, "hpa-slots": TARGET_RATIO, "kpa": TARGET_RATIO, "serve": TARGET_RATIO,
}  # fmt: skip
"""Default targets of the policies that have one: a share of the busiest minute's replicas, of the GPU's
time, or of the concurrency limit."""


@dataclass(frozen=True, slots=True)
class PolicyInput:
    """The input of a scaling policy for one tier: tierplane's observation, and the signals that other
    policies use."""

    observation: TierObservation
    unfinished: float
    """Requests that ran or waited, averaged over the interval."""
    busy_ratio: float
    """Share of the interval in which a replica's engine worked, averaged over the ready replicas."""
    slots: int
    """Sum of the concurrency limits of the ready replicas."""


class ScalingPolicy(Protocol):
    """Decides how many replicas each tier has."""

    period_s: float
    """Interval between decisions."""

    def decide(self, inputs: Sequence[PolicyInput], gpus: float | None) -> Sequence[ScalingDecision]:
        """A decision for each tier, in the order of ``inputs``. ``gpus`` is the number that all tiers
        together may use; None means no limit."""

    def learned(self, tier: str) -> TierScaler | None:
        """The scaler that has measured the tier's engines, for recommendations; None if the policy doesn't
        measure them."""


MakePolicy = Callable[[Scenario], ScalingPolicy]


def decision(tier: PolicyInput, target: int, reason: str) -> ScalingDecision:
    """The decision of a policy other than ``tierplane``."""
    observation = tier.observation
    return ScalingDecision(observation.tier, observation.target, target, reason, requested=target)


class TierplanePolicy:
    """tierplane's own policy."""

    def __init__(self, scenario: Scenario) -> None:
        self.period_s = min(tier.rule.tick_s for tier in scenario.tiers)
        self._round = ScalingRound(tier.rule for tier in scenario.tiers)

    def decide(self, inputs: Sequence[PolicyInput], gpus: float | None) -> tuple[ScalingDecision, ...]:
        """The decisions of one round of scaling."""
        return self._round.decide([tier.observation for tier in inputs], gpus)

    def learned(self, tier: str) -> TierScaler | None:
        """The tier's scaler."""
        return self._round.scaler(tier)


class OneTierPolicy(Protocol):
    """Decides how many replicas one tier has, independently of other tiers."""

    period_s: float
    """Interval between decisions."""

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        """The decision for the tier."""


class _PolicyPerTier:
    """A separate policy for each tier. These policies ignore the GPU budget, so replicas without room
    wait."""

    def __init__(self, policies: Sequence[OneTierPolicy]) -> None:
        self.period_s = min(policy.period_s for policy in policies)
        self._policies = policies

    def decide(self, inputs: Sequence[PolicyInput], gpus: float | None) -> tuple[ScalingDecision, ...]:
        """Each policy's decision for its tier."""
        return tuple(policy.decide(tier) for tier, policy in zip(inputs, self._policies, strict=True))

    def learned(self, tier: str) -> TierScaler | None:
        """None: these policies don't measure engines."""
        return None


def per_tier(make: Callable[[TierScenario], OneTierPolicy]) -> MakePolicy:
    """A policy that uses a separate policy for each tier, created by ``make``."""
    return lambda scenario: _PolicyPerTier([make(tier) for tier in scenario.tiers])


class StaticPolicy:
    """Always the same number of replicas."""

    period_s = 60.0

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        """The fixed number."""
        return decision(tier, self.replicas, "static")


class HpaPolicy:
    """Kubernetes: ``ceil(current * metric / target)`` every 15 s, unless within the tolerance of 10 %; up
    by at most 4 pods or 100 % in 15 s, down to the largest desired number of the last 300 s."""

    period_s = 15.0

    def __init__(self, tier: TierScenario, metric: Callable[[PolicyInput], float], target: float) -> None:
        self._lowest, self._highest = max(tier.rule.min_replicas, 1), tier.rule.max_replicas
        self._metric = metric
        self._target = target
        self._recent: deque[tuple[float, int]] = deque()
        """(time, desired number) of the last 300 s."""

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        """The controller's next step."""
        now_s = tier.observation.now_s
        current, ready = tier.observation.target, max(tier.observation.ready, 1)
        ratio = self._metric(tier) / self._target
        # When scaling up, pods that are not ready count as idle, so that they don't cause more pods.
        if ratio > 1.0:
            ratio = max(1.0, ratio * ready / max(current, 1))
            desired = current if ratio <= 1.1 else math.ceil(current * ratio - 1e-9)
        else:
            desired = current if ratio >= 0.9 else math.ceil(ready * ratio - 1e-9)
        desired = min(max(desired, self._lowest), self._highest)
        desired = min(desired, max(current + 4, 2 * current))
        self._recent.append((now_s, desired))
        while self._recent[0][0] < now_s - 300.0:
            self._recent.popleft()
        target = desired if desired > current else min(current, max(entry[1] for entry in self._recent))
        return decision(tier, target, f"{ratio:.2f} of the target")


class KpaPolicy:
    """Knative: concurrency over 60 s and, in a panic, over 6 s. A panic begins at twice the capacity, never
    scales down, and ends 60 s after its last cause."""

    period_s = 2.0

    def __init__(self, tier: TierScenario, target: float) -> None:
        self._lowest, self._highest = max(tier.rule.min_replicas, 1), tier.rule.max_replicas
        self._target = tier.replica.concurrency_limit * target
        self._recent: deque[tuple[float, float]] = deque()
        """(time, concurrency) of the last 60 s."""
        self._panic_s = -math.inf
        """Time of the last cause of a panic."""
        self._panic_target = 0

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        """The autoscaler's next step."""
        now_s = tier.observation.now_s
        self._recent.append((now_s, tier.unfinished))
        while self._recent[0][0] <= now_s - 60.0:
            self._recent.popleft()
        stable = sum(value for _, value in self._recent) / len(self._recent)
        last = [value for at_s, value in self._recent if at_s > now_s - 6.0]
        panic = sum(last) / len(last)
        ready = max(tier.observation.ready, 1)
        # The target is at most 1000 times, and at least half, the number of ready replicas.
        stable_target = min(max(math.ceil(stable / self._target), ready // 2), 1000 * ready)
        panic_target = min(max(math.ceil(panic / self._target), ready // 2), 1000 * ready)
        if panic_target / ready >= 2.0:
            if now_s - self._panic_s > 60.0:
                self._panic_target = 0
            self._panic_s = now_s
        target = stable_target
        reason = f"{stable:.1f} at once over 60 s"
        if now_s - self._panic_s <= 60.0:
            self._panic_target = target = max(self._panic_target, panic_target, stable_target)
            reason = f"panic: {panic:.1f} at once over 6 s"
        return decision(tier, min(max(target, self._lowest), self._highest), reason)


class ServePolicy:
    """Ray Serve's default policy: the functions of the installed ``ray.serve.autoscaling_policy``.

    They are called in the same order as by Serve's own wrapper, with the virtual time instead of
    ``time.time()``, and Serve's bounds are applied afterwards. Requests are averaged over
    ``look_back_period_s``.
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

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        """Serve's next step."""
        now_s = tier.observation.now_s
        config = self._config
        self._recent.append((now_s, tier.unfinished))
        while self._recent[0][0] <= now_s - config.look_back_period_s:
            self._recent.popleft()
        requests = sum(value for _, value in self._recent) / len(self._recent)
        ready, target = tier.observation.ready, tier.observation.target
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
        return decision(tier, bounded, f"{requests:.1f} requests over {config.look_back_period_s:g} s")


def busy_ratio(tier: PolicyInput) -> float:
    """GPU utilisation."""
    return tier.busy_ratio


def slot_ratio(tier: PolicyInput) -> float:
    """Used share of the concurrency limits, waiting requests included."""
    return tier.unfinished / tier.slots if tier.slots else 1.0


NAMES: Final = (
    "tierplane", "static", "hpa", "hpa-slots", "kpa", "serve", "serve-default", "oracle",
)  # fmt: skip
"""All policies; ``static`` and ``oracle`` need the whole trace in advance."""


def reactive_policy(name: str, target: float | None = None) -> MakePolicy:
    """Makes a policy that doesn't need the trace in advance; ``target`` replaces its default in ``TARGETS``.
    KeyError if no such policy exists."""
    if name == "tierplane":
        return TierplanePolicy
    if name == "serve-default":
        return per_tier(ServePolicy)
    target = TARGETS[name] if target is None else target
    makers: dict[str, Callable[[TierScenario], OneTierPolicy]] = {
        "hpa": lambda tier: HpaPolicy(tier, busy_ratio, target),
        "hpa-slots": lambda tier: HpaPolicy(tier, slot_ratio, target),
        "kpa": lambda tier: KpaPolicy(tier, target),
        "serve": lambda tier: ServePolicy(tier, tier.replica.concurrency_limit * target),
    }
    return per_tier(makers[name])
