"""Makes recommendations: what a tier lacks or has too much of, what to change, the predicted effect, and a
confidence.

:func:`recommend` evaluates the windowed signals of all tiers and makes at most one recommendation for each.
Only fresh signals count: a stale or missing signal breaches no threshold and never makes a tier idle. A
recommendation records the breaches that caused it, with their limits. :func:`score` rates the outcome,
whether the recommendation was followed or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from controlplane.core.autoscaling.capacity import LatencyBounds, ReplicaCapacity
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.telemetry.series import Signal, missing

_NOT_MEASURED: Final = missing("not measured")
GPU_LOAD: Final = "GPU utilisation"
SLOT_LOAD: Final = "the used share of its slots"
"""Used in place of GPU utilisation for tiers without a GPU."""
LATENCY_MS: Final = 3000.0
"""The latency limit if neither a threshold nor the tier's SLO sets one."""
_LATENCY_QUANTILE: Final = 0.95
"""The quantile of :attr:`TierCondition.latency_ms`."""
_MAX_CONFIDENCE: Final = 0.95
_FAILING_CONFIDENCE: Final = 0.3
"""More replicas seldom fix errors."""
_BUSY_CONFIDENCE: Final = 0.2
"""A tier that is busy but meets its SLO has no problem yet."""


class RecommendationKind(StrEnum):
    """What to change."""

    SCALE_UP = "scale_up"
    """A larger GPU share or more tensor parallelism, to make each request faster."""
    SCALE_OUT = "scale_out"
    """More replicas, to serve more requests."""
    SCALE_DOWN = "scale_down"
    REBALANCE = "rebalance"
    """Take a replica from an idle tier and give its GPUs to a tier that needs them."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The limits of the figures."""

    gpu_ratio: float = 0.95
    memory_ratio: float = 0.95
    latency_ms: float | None = None
    """None means each tier's own limit, :attr:`TierCondition.latency_limit_ms`."""
    queue: float = 50.0
    kv_ratio: float = 0.95
    error_ratio: float = 0.10
    idle_gpu_ratio: float = 0.20
    idle_requests_per_s: float = 1.0


class Figure(StrEnum):
    """A figure with an upper limit (attainment: a lower limit); the value is its name in
    :class:`TierCondition`."""

    LOAD = "gpu_ratio"
    MEMORY = "memory_ratio"
    KV = "kv_ratio"
    QUEUE = "queue"
    LATENCY = "latency_ms"
    ATTAINMENT = "attainment"
    ERRORS = "error_ratio"


@dataclass(frozen=True, slots=True)
class Breach:
    """A figure past its limit when a recommendation was made."""

    figure: Figure
    limit: float


@dataclass(frozen=True, slots=True)
class TierCondition:
    """The condition of one tier over the last minutes."""

    tier: str
    replicas: int
    min_replicas: int = 1
    max_replicas: int = 10
    gpus_per_replica: float = 1.0
    tensor_parallel: int = 1
    gpu_ratio: Signal = _NOT_MEASURED
    """Utilisation of its busiest GPU, or the used share of its slots for a tier without a GPU."""
    load_name: str = GPU_LOAD
    """What ``gpu_ratio`` measures."""
    memory_ratio: Signal = _NOT_MEASURED
    """Used memory of its fullest GPU."""
    kv_ratio: Signal = _NOT_MEASURED
    """Usage of its fullest KV cache."""
    latency_ms: Signal = _NOT_MEASURED
    """95th percentile of the time for a whole response."""
    latency_limit_ms: float = LATENCY_MS
    """Applies if no threshold is set; see :func:`latency_limit_ms`."""
    queue: Signal = _NOT_MEASURED
    error_ratio: Signal = _NOT_MEASURED
    requests_per_s: Signal = _NOT_MEASURED
    attainment: Signal = _NOT_MEASURED
    """Ratio of requests that met the SLO."""
    goal: float = 0.99
    """The ratio that the SLO requires; a lower attainment is a breach."""
    capacity: ReplicaCapacity | None = None
    mean_request: RequestShape | None = None
    bounds: LatencyBounds | None = None
    observed_s: float = math.inf
    """How long the tier has been observed with the replicas that it has now."""
    min_observed_s: float = 0.0
    """Before that, a tier without requests does not count as idle."""


@dataclass(frozen=True, slots=True)
class Effect:
    """The predicted effect of following a recommendation; None means no prediction."""

    latency_ms: float | None
    """The same percentile as :attr:`TierCondition.latency_ms`."""
    attainment: float | None
    gpus: float
    """Additional GPUs; negative if GPUs are freed."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommendation. The controller's store uses these field names as keys."""

    instance: str
    """The tier."""
    kind: RecommendationKind
    reasons: tuple[str, ...]
    """Each has the value and its threshold."""
    suggestion: str
    effect: Effect
    confidence: float
    replicas: int
    """Replicas that the tier would have after following it."""
    latency_ms: float | None = None
    """The latency when the recommendation was made."""
    gpus_per_replica: float = 0.0
    """GPUs of each replica when the recommendation was made."""
    named: tuple[Breach, ...] = ()
    """The breaches that caused it; empty if the tier was idle."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a recommendation turned out."""

    right: bool
    value: float
    """In [0, 1]."""
    reason: str


@dataclass(slots=True)
class _Breaches:
    """The figures of a tier that are past their limits: texts by kind of trouble, and the breaches."""

    saturated: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)
    named: list[Breach] = field(default_factory=list)

    def check(self, tier: TierCondition, figure: Figure, limit: float, reasons: list[str]) -> None:
        """Add the figure if it is past the limit."""
        breach = Breach(figure, limit)
        if _holds(tier, breach):
            reasons.append(_text(tier, breach))
            self.named.append(breach)


def latency_limit_ms(slo: Slo | None) -> float:
    """The limit of a tier's 95th latency percentile if no threshold is set. ``slo`` is the configured SLO;
    without one the limit is :data:`LATENCY_MS`.

    The SLO's ``total_s`` is the limit only if at most 5 % of the requests may miss it; otherwise latency has
    no limit, and attainment shows whether the SLO is met.
    """
    if slo is None:
        return LATENCY_MS
    return slo.total_s * 1000 if slo.attainment >= _LATENCY_QUANTILE else math.inf


def recommend(
    tiers: Sequence[TierCondition], thresholds: Thresholds | None = None, free_gpus: float | None = None
) -> tuple[Recommendation, ...]:
    """At most one recommendation for each tier. If ``free_gpus`` is None, the number is unknown, and GPUs are
    assumed to be free."""
    limits = thresholds or Thresholds()
    idle = [tier for tier in tiers if _idle(tier, limits) and tier.replicas > tier.min_replicas]
    found: list[Recommendation] = []
    donors: set[str] = set()
    for tier in tiers:
        breaches = _breaches(tier, limits)
        if breaches.saturated:
            scale_out = _scale_out(tier, breaches)
            if free_gpus is not None and scale_out.effect.gpus > free_gpus:
                donor = next((other for other in idle if other.tier not in donors | {tier.tier}), None)
                if donor is not None:
                    donors.add(donor.tier)
                    scale_out = _rebalance(scale_out, donor)
            found.append(scale_out)
        elif breaches.slow:
            found.append(_scale_up(tier, breaches))
        elif breaches.failing:
            found.append(_replace_failing(tier, breaches))
    covered = {item.instance for item in found}
    found += [_scale_down(tier, limits) for tier in idle if tier.tier not in covered | donors]
    return tuple(found)


def score(recommendation: Recommendation, tier: TierCondition, *, applied: bool) -> Score | None:
    """Rate a recommendation by the later condition of its tier. None if a figure that this needs is not
    fresh.

    If it was applied, the score is how close the prediction came. If not, it was right if the breaches that
    caused it still exist or the tier's attainment is below what its SLO requires; a scale-down was right if
    the attainment is not below that."""
    latency_ms, attainment = tier.latency_ms.fresh, tier.attainment.fresh
    if latency_ms is None or attainment is None:
        return None
    if not applied:
        return _score_not_applied(recommendation, tier, attainment)
    predicted, errors = recommendation.effect, []
    if predicted.latency_ms:
        errors.append(abs(latency_ms - predicted.latency_ms) / max(latency_ms, predicted.latency_ms))
    if predicted.attainment is not None:
        errors.append(min(1.0, abs(attainment - predicted.attainment) * 10))
    value = 1.0 - sum(errors) / len(errors) if errors else float(attainment >= tier.goal)
    text = "-" if predicted.latency_ms is None else f"{predicted.latency_ms:.0f}"
    return Score(value >= 0.5, value, f"{latency_ms:.0f} ms measured, {text} predicted")


def _score_not_applied(
    recommendation: Recommendation, tier: TierCondition, attainment: float
) -> Score | None:
    text = f"attainment is {attainment:.1%}"
    scale_down = recommendation.kind is RecommendationKind.SCALE_DOWN
    if scale_down or attainment < tier.goal:
        right = scale_down == (attainment >= tier.goal)
        return Score(right, float(right), f"not applied; {text}")
    still = [_text(tier, breach) for breach in recommendation.named if _holds(tier, breach)]
    if still:
        return Score(True, 1.0, f"not applied; still {', '.join(still)}; {text}")
    if any(_value(tier, breach.figure) is None for breach in recommendation.named):
        return None
    return Score(False, 0.0, f"not applied; {text}, and what it named is over")


def _value(tier: TierCondition, figure: Figure) -> float | None:
    """The figure's value; None if it is not fresh."""
    signal: Signal = getattr(tier, figure.value)
    return signal.fresh


def _holds(tier: TierCondition, breach: Breach) -> bool:
    """Whether the figure is past the limit; False if it is not fresh."""
    value = _value(tier, breach.figure)
    if value is None:
        return False
    return value < breach.limit if breach.figure is Figure.ATTAINMENT else value > breach.limit


def _text(tier: TierCondition, breach: Breach) -> str:
    """A breach as text, with value and limit."""
    value, limit = _value(tier, breach.figure) or 0.0, breach.limit
    texts = {
        Figure.LOAD: f"{tier.load_name} is {value:.0%}, over {limit:.0%}",
        Figure.MEMORY: f"GPU memory is {value:.0%} used, over {limit:.0%}",
        Figure.KV: f"a KV cache is {value:.0%} full, over {limit:.0%}",
        Figure.QUEUE: f"{value:.0f} requests wait, over {limit:.0f}",
        Figure.LATENCY: f"latency is {value:.0f} ms, over {limit:.0f} ms",
        Figure.ATTAINMENT: f"{value:.1%} of the requests keep the SLO, under {limit * 100:.4g}%",
        Figure.ERRORS: f"{value:.0%} of the requests fail, over {limit:.0%}",
    }
    return texts[breach.figure]


def _breaches(tier: TierCondition, limits: Thresholds) -> _Breaches:
    found = _Breaches()
    latency_ms = tier.latency_limit_ms if limits.latency_ms is None else limits.latency_ms
    found.check(tier, Figure.LOAD, limits.gpu_ratio, found.saturated)
    found.check(tier, Figure.MEMORY, limits.memory_ratio, found.saturated)
    found.check(tier, Figure.KV, limits.kv_ratio, found.saturated)
    found.check(tier, Figure.QUEUE, limits.queue, found.saturated)
    found.check(tier, Figure.LATENCY, latency_ms, found.slow)
    found.check(tier, Figure.ATTAINMENT, tier.goal, found.slow)
    found.check(tier, Figure.ERRORS, limits.error_ratio, found.failing)
    return found


def _only_busy(tier: TierCondition, breaches: _Breaches) -> str:
    """Why a tier needs nothing although its GPUs are busy; empty if other limits are breached as well."""
    if [breach.figure for breach in breaches.named] != [Figure.LOAD] or tier.queue.fresh != 0:
        return ""
    if tier.requests_per_s.fresh == 0:
        return "but no request came: see first what else keeps the GPU busy"
    attainment = tier.attainment.fresh
    met = attainment is not None and attainment >= tier.goal
    return "but the SLO is met and nothing waits" if met else ""


def _count(replicas: int) -> str:
    return f"{replicas} replica{'s' * (replicas != 1)}"


def _idle(tier: TierCondition, limits: Thresholds) -> bool:
    gpu, rate, queue = tier.gpu_ratio.fresh, tier.requests_per_s.fresh, tier.queue.fresh
    if gpu is None or rate is None or queue is None or tier.observed_s < tier.min_observed_s:
        return False
    return gpu < limits.idle_gpu_ratio and rate < limits.idle_requests_per_s and queue == 0


def _effect(tier: TierCondition, replicas: int, gpus: float) -> Effect:
    """The prediction of the capacity model; attainment is the ratio of arrivals that find a free slot.

    The model gives the mean time of a request at a replica, but the measured latency is a percentile.
    Therefore the measured latency, less the present wait in the queue (Little's law), is scaled by the change
    of the mean.
    """
    capacity, request, bounds, rate = tier.capacity, tier.mean_request, tier.bounds, tier.requests_per_s.fresh
    if capacity is None or request is None or bounds is None or rate is None or replicas < 1:
        return Effect(None, None, gpus)
    each_per_s = capacity.requests_per_s(request, capacity.most_sequences(request, bounds))
    carried = min(1.0, replicas * each_per_s / rate) if rate > 0 else 1.0
    then_s = capacity.residence_s(min(rate / replicas, each_per_s), request)
    now_s = capacity.residence_s(min(rate / max(tier.replicas, 1), each_per_s), request)
    latency, queue = tier.latency_ms.fresh, tier.queue.fresh or 0.0
    if latency is None or not (math.isfinite(then_s) and 0 < now_s < math.inf):
        return Effect(None, carried, gpus)
    served_per_s = min(rate, tier.replicas * each_per_s)
    waits_ms = queue / served_per_s * 1000 if served_per_s > 0 else 0.0
    return Effect(max((latency - waits_ms) * then_s / now_s, then_s * 1000), carried, gpus)


def _scale_out(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    only_busy = _only_busy(tier, breaches)
    calm = (only_busy,) if only_busy else ()
    reasons = (*breaches.saturated, *breaches.slow, *breaches.failing, *calm)
    rate = tier.requests_per_s.fresh
    replicas = tier.replicas + 1
    capacity, request, bounds = tier.capacity, tier.mean_request, tier.bounds
    if capacity is not None and request is not None and bounds is not None and rate is not None:
        replicas = max(replicas, capacity.replicas(rate, request, bounds))
    replicas = min(replicas, max(tier.max_replicas, tier.replicas))
    more = replicas - tier.replicas
    suggestion = f"run {_count(replicas)} instead of {tier.replicas}"
    if not more:
        suggestion = f"raise the most replicas it may have, {tier.max_replicas}: all of them are saturated"
    effect = _effect(tier, replicas, more * tier.gpus_per_replica)
    return _recommendation(
        *(tier, RecommendationKind.SCALE_OUT, reasons, suggestion, effect, replicas, breaches.named),
        max_confidence=_BUSY_CONFIDENCE if only_busy else _MAX_CONFIDENCE,
    )


def _scale_up(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    """For a tier that is slow although neither GPUs nor queue are saturated: more replicas would not help."""
    reasons = (*breaches.slow, "neither GPUs nor queue are saturated", *breaches.failing)
    if not tier.gpus_per_replica:
        suggestion = "give each replica more CPU cores, or take a smaller model or a GPU"
        gpus = 0.0
    elif tier.gpus_per_replica < 1:
        share = min(1.0, tier.gpus_per_replica * 2)
        suggestion = f"give each replica {share:g} of a GPU instead of {tier.gpus_per_replica:g}"
        gpus = (share - tier.gpus_per_replica) * tier.replicas
    else:
        suggestion = (
            f"set tensor_parallel_size to {tier.tensor_parallel * 2} instead of {tier.tensor_parallel}"
        )
        gpus = tier.gpus_per_replica * tier.replicas
    latency = tier.latency_ms.fresh
    # Twice the bandwidth reads the weights in half the time; all-reduces cost part of the gain.
    faster = latency * 0.6 if latency is not None and tier.gpus_per_replica else None
    effect = Effect(faster, None, gpus)
    return _recommendation(
        tier, RecommendationKind.SCALE_UP, reasons, suggestion, effect, tier.replicas, breaches.named
    )


def _replace_failing(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    reasons = tuple(breaches.failing)
    suggestion = "look at the replicas' diagnoses first; one more replica takes over from those that fail"
    replicas = min(tier.replicas + 1, max(tier.max_replicas, tier.replicas))
    effect = Effect(None, None, (replicas - tier.replicas) * tier.gpus_per_replica)
    return _recommendation(
        *(tier, RecommendationKind.SCALE_OUT, reasons, suggestion, effect, replicas, breaches.named),
        max_confidence=_FAILING_CONFIDENCE,
    )


def _scale_down(tier: TierCondition, limits: Thresholds) -> Recommendation:
    gpu, rate = tier.gpu_ratio.fresh or 0.0, tier.requests_per_s.fresh or 0.0
    reasons = (
        f"{tier.load_name} is {gpu:.0%}, under {limits.idle_gpu_ratio:.0%}",
        f"{rate:.2f} requests/s, under {limits.idle_requests_per_s:g}",
    )
    replicas = tier.replicas - 1
    effect = _effect(tier, replicas, 0.0 - tier.gpus_per_replica)
    suggestion = f"run {_count(replicas)} instead of {tier.replicas}"
    return _recommendation(tier, RecommendationKind.SCALE_DOWN, reasons, suggestion, effect, replicas)


def _rebalance(scale_out: Recommendation, donor: TierCondition) -> Recommendation:
    return replace(
        scale_out,
        kind=RecommendationKind.REBALANCE,
        reasons=(*scale_out.reasons, f"no GPU is free, and tier '{donor.tier}' is idle"),
        suggestion=(
            f"take a replica from tier '{donor.tier}' ({donor.replicas} now) and {scale_out.suggestion}"
        ),
        effect=replace(scale_out.effect, gpus=scale_out.effect.gpus - donor.gpus_per_replica),
    )


def _recommendation(
    tier: TierCondition,
    kind: RecommendationKind,
    reasons: tuple[str, ...],
    suggestion: str,
    effect: Effect,
    replicas: int,
    named: Sequence[Breach] = (),
    max_confidence: float = _MAX_CONFIDENCE,
) -> Recommendation:
    """The recommendation. Its confidence grows with the number of reasons, and with how much of the engine's
    speed has been measured."""
    measured = tier.capacity.confidence if tier.capacity is not None else 0.0
    return Recommendation(
        instance=tier.tier,
        kind=kind,
        reasons=reasons,
        suggestion=suggestion,
        effect=effect,
        confidence=min(max_confidence, 0.4 + 0.1 * len(reasons) + 0.35 * measured),
        replicas=replicas,
        latency_ms=tier.latency_ms.fresh,
        gpus_per_replica=tier.gpus_per_replica,
        named=tuple(named),
    )
