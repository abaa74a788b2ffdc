"""Advice for people: what a tier lacks or has too much of, what to do, what that would bring, how sure it is.

:func:`advise` looks at the windowed signals of all tiers and gives at most one recommendation for each. Only
fresh signals count: what is stale or missing breaches no threshold, and never makes a tier idle. An advice
keeps what it named, with the limits of then. What came of it, followed or not, is judged by :func:`score`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from controlplane.core.autoscaling.capacity import LatencyBounds, ReplicaCapacity, RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.telemetry.series import Signal, missing

_NOT_MEASURED: Final = missing("not measured")
GPU_LOAD: Final = "GPU utilisation"
SLOT_LOAD: Final = "the used share of its slots"
"""Stands for it where there is no GPU to ask."""
LATENCY_MS: Final = 3000.0
"""The limit where neither a threshold nor the tier's SLO says one."""
_LATENCY_QUANTILE: Final = 0.95
"""Of the latency that is looked at."""
_FAILING_CONFIDENCE: Final = 0.3
"""More replicas seldom cure errors."""
_BUSY_CONFIDENCE: Final = 0.2
"""A tier that is only busy has no trouble yet."""


class RecommendationKind(StrEnum):
    """What to do."""

    SCALE_UP = "scale_up"
    """More of a GPU, or more tensor parallelism: each request must become faster."""
    SCALE_OUT = "scale_out"
    """More replicas: there are too many requests."""
    SCALE_DOWN = "scale_down"
    REBALANCE = "rebalance"
    """Move GPUs from an idle tier to one that lacks them."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a figure is a breach."""

    gpu_ratio: float = 0.95
    memory_ratio: float = 0.95
    latency_ms: float | None = None
    """None: as each tier has it."""
    queue: float = 50.0
    kv_ratio: float = 0.95
    error_ratio: float = 0.10
    idle_gpu_ratio: float = 0.20
    idle_requests_per_s: float = 1.0


class Figure(StrEnum):
    """What can be over its limit (attainment: under it), by its name in :class:`TierCondition`."""

    LOAD = "gpu_ratio"
    MEMORY = "memory_ratio"
    KV = "kv_ratio"
    QUEUE = "queue"
    LATENCY = "latency_ms"
    ATTAINMENT = "attainment"
    ERRORS = "error_ratio"


@dataclass(frozen=True, slots=True)
class Breach:
    """A figure that an advice was given for."""

    figure: Figure
    limit: float
    """As it was then."""


@dataclass(frozen=True, slots=True)
class TierCondition:
    """One tier as the last minutes show it."""

    tier: str
    replicas: int
    min_replicas: int = 1
    max_replicas: int = 10
    gpus_per_replica: float = 1.0
    tensor_parallel: int = 1
    gpu_ratio: Signal = _NOT_MEASURED
    """Highest of its GPUs."""
    load_name: str = GPU_LOAD
    """What ``gpu_ratio`` is."""
    memory_ratio: Signal = _NOT_MEASURED
    """Of GPU memory, the highest of its GPUs."""
    kv_ratio: Signal = _NOT_MEASURED
    """Of its KV caches, the fullest."""
    latency_ms: Signal = _NOT_MEASURED
    """95th percentile of the whole answer."""
    latency_limit_ms: float = LATENCY_MS
    """Where no threshold says one: see :func:`latency_limit_ms`."""
    queue: Signal = _NOT_MEASURED
    error_ratio: Signal = _NOT_MEASURED
    requests_per_s: Signal = _NOT_MEASURED
    attainment: Signal = _NOT_MEASURED
    """Share of the requests that kept the SLO."""
    goal: float = 0.99
    """The share that the SLO asks for; less is a breach."""
    capacity: ReplicaCapacity | None = None
    work: RequestShape | None = None
    bounds: LatencyBounds | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What following the advice is expected to bring; None: it can't be told."""

    latency_ms: float | None
    """Of the same percentile as is measured."""
    attainment: float | None
    gpus: float
    """More GPUs (or fewer, if negative)."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One advice."""

    instance: str
    kind: RecommendationKind
    reasons: tuple[str, ...]
    """Each with its figure and the threshold."""
    suggestion: str
    effect: Effect
    confidence: float
    replicas: int
    """That the tier would have."""
    latency_ms: float | None = None
    """As it was when the advice was given."""
    gpus_per_replica: float = 0.0
    """As it was then."""
    named: tuple[Breach, ...] = ()
    """The trouble that it was given for; nothing if it was idleness."""


@dataclass(frozen=True, slots=True)
class Score:
    """How good an advice was."""

    right: bool
    value: float
    """In [0, 1]."""
    reason: str


@dataclass(slots=True)
class _Breaches:
    """What is over its threshold: the reasons, and all that they name."""

    saturated: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)
    named: list[Breach] = field(default_factory=list)

    def look(self, tier: TierCondition, figure: Figure, limit: float, reasons: list[str]) -> None:
        """Note the figure if it is a breach."""
        breach = Breach(figure, limit)
        if _holds(tier, breach):
            reasons.append(_text(tier, breach))
            self.named.append(breach)


def latency_limit_ms(slo: Slo | None) -> float:
    """What the 95th percentile of a tier's answers may be where no threshold is set for it. ``slo`` is what
    the configuration gives, None if it gives none: then :data:`LATENCY_MS`.

    An SLO's limit of whole answers counts only where it may be missed by no more than the percentile leaves
    out; what else it promises shows in the attainment.
    """
    if slo is None:
        return LATENCY_MS
    return slo.total_s * 1000 if slo.attainment >= _LATENCY_QUANTILE else math.inf


def advise(
    tiers: Sequence[TierCondition], thresholds: Thresholds | None = None, free_gpus: float | None = None
) -> tuple[Recommendation, ...]:
    """At most one recommendation for each tier. ``free_gpus`` None: not known, then they are taken to be
    there."""
    limits = thresholds or Thresholds()
    idle = [tier for tier in tiers if _idle(tier, limits) and tier.replicas > tier.min_replicas]
    found: list[Recommendation] = []
    givers: set[str] = set()
    for tier in tiers:
        breaches = _breaches(tier, limits)
        if breaches.saturated:
            wants = _out(tier, breaches)
            if free_gpus is not None and wants.effect.gpus > free_gpus:
                giver = next((other for other in idle if other.tier not in givers | {tier.tier}), None)
                if giver is not None:
                    givers.add(giver.tier)
                    wants = _moved(wants, giver)
            found.append(wants)
        elif breaches.slow:
            found.append(_up(tier, breaches))
        elif breaches.failing:
            found.append(_failing(tier, breaches))
    advised = {advice.instance for advice in found}
    found += [_down(tier, limits) for tier in idle if tier.tier not in advised | givers]
    return tuple(found)


def score(advice: Recommendation, tier: TierCondition, *, applied: bool) -> Score | None:
    """How good it was, by how its tier is afterwards. None: a figure that it takes is not fresh.

    Applied: how near the prediction came. Not applied: whether the trouble it named is still there, or the
    tier attains less than its SLO asks for (scale-down: whether it attains that).
    """
    latency_ms, attainment = tier.latency_ms.fresh, tier.attainment.fresh
    if latency_ms is None or attainment is None:
        return None
    if not applied:
        return _not_applied(advice, tier, attainment)
    errors = []
    if advice.effect.latency_ms:
        errors.append(abs(latency_ms - advice.effect.latency_ms) / max(latency_ms, advice.effect.latency_ms))
    if advice.effect.attainment is not None:
        errors.append(min(1.0, abs(attainment - advice.effect.attainment) * 10))
    value = 1.0 - sum(errors) / len(errors) if errors else float(attainment >= tier.goal)
    predicted = "-" if advice.effect.latency_ms is None else f"{advice.effect.latency_ms:.0f}"
    return Score(value >= 0.5, value, f"{latency_ms:.0f} ms measured, {predicted} predicted")


def _not_applied(advice: Recommendation, tier: TierCondition, attainment: float) -> Score | None:
    kept = f"attainment is {attainment:.1%}"
    if advice.kind is RecommendationKind.SCALE_DOWN or attainment < tier.goal:
        right = (advice.kind is RecommendationKind.SCALE_DOWN) == (attainment >= tier.goal)
        return Score(right, float(right), f"not applied; {kept}")
    still = [_text(tier, breach) for breach in advice.named if _holds(tier, breach)]
    if still:
        return Score(True, 1.0, f"not applied; still {', '.join(still)}; {kept}")
    if any(_value(tier, breach.figure) is None for breach in advice.named):
        return None
    return Score(False, 0.0, f"not applied; {kept}, and what it named is over")


def _value(tier: TierCondition, figure: Figure) -> float | None:
    """None: it is not fresh."""
    signal: Signal = getattr(tier, figure.value)
    return signal.fresh


def _holds(tier: TierCondition, breach: Breach) -> bool:
    """Is it so, as far as is known?"""
    value = _value(tier, breach.figure)
    if value is None:
        return False
    return value < breach.limit if breach.figure is Figure.ATTAINMENT else value > breach.limit


def _text(tier: TierCondition, breach: Breach) -> str:
    """A breach that holds, with its figure and the limit."""
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
    found.look(tier, Figure.LOAD, limits.gpu_ratio, found.saturated)
    found.look(tier, Figure.MEMORY, limits.memory_ratio, found.saturated)
    found.look(tier, Figure.KV, limits.kv_ratio, found.saturated)
    found.look(tier, Figure.QUEUE, limits.queue, found.saturated)
    found.look(tier, Figure.LATENCY, latency_ms, found.slow)
    found.look(tier, Figure.ATTAINMENT, tier.goal, found.slow)
    found.look(tier, Figure.ERRORS, limits.error_ratio, found.failing)
    return found


def _only_busy(tier: TierCondition, breaches: _Breaches) -> str:
    """Its GPUs work all the time, and that is all: why this is no trouble, or empty if it is not so."""
    if [breach.figure for breach in breaches.named] != [Figure.LOAD] or tier.queue.fresh != 0:
        return ""
    if tier.requests_per_s.fresh == 0:
        return "but no request came: see first what else keeps the GPU busy"
    kept = tier.attainment.fresh
    return "but the SLO is kept and nothing waits" if kept is not None and kept >= tier.goal else ""


def _count(replicas: int) -> str:
    return f"{replicas} replica{'s' * (replicas != 1)}"


def _idle(tier: TierCondition, limits: Thresholds) -> bool:
    gpu, rate, queue = tier.gpu_ratio.fresh, tier.requests_per_s.fresh, tier.queue.fresh
    if gpu is None or rate is None or queue is None:
        return False
    return gpu < limits.idle_gpu_ratio and rate < limits.idle_requests_per_s and queue == 0


def _effect(tier: TierCondition, replicas: int, gpus: float) -> Effect:
    """From the capacity model; the attainment is the share of the arrivals that finds a free slot.

    The model says how long a request is with a replica on the average, and what is measured is a percentile
    of whole answers. So the measured one, less what the queue adds to it now (Little's law), is taken to
    change as the average does.
    """
    rate = tier.requests_per_s.fresh
    if tier.capacity is None or tier.work is None or tier.bounds is None or rate is None or replicas < 1:
        return Effect(None, None, gpus)
    capacity, work = tier.capacity, tier.work
    each_per_s = capacity.requests_per_s(work, capacity.most_sequences(work, tier.bounds))
    carried = min(1.0, replicas * each_per_s / rate) if rate > 0 else 1.0
    then_s = capacity.hold_s(min(rate / replicas, each_per_s), work)
    now_s = capacity.hold_s(min(rate / max(tier.replicas, 1), each_per_s), work)
    latency, queue = tier.latency_ms.fresh, tier.queue.fresh or 0.0
    if latency is None or not (math.isfinite(then_s) and 0 < now_s < math.inf):
        return Effect(None, carried, gpus)
    served_per_s = min(rate, tier.replicas * each_per_s)
    waits_ms = queue / served_per_s * 1000 if served_per_s > 0 else 0.0
    return Effect(max((latency - waits_ms) * then_s / now_s, then_s * 1000), carried, gpus)


def _confidence(tier: TierCondition, breaches: int) -> float:
    """More with each breach that agrees, and with what is measured of the engine's speed."""
    measured = tier.capacity.confidence if tier.capacity is not None else 0.0
    return min(0.95, 0.4 + 0.1 * breaches + 0.35 * measured)


def _out(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    only_busy = _only_busy(tier, breaches)
    calm = (only_busy,) if only_busy else ()
    reasons = (*breaches.saturated, *breaches.slow, *breaches.failing, *calm)
    rate = tier.requests_per_s.fresh
    replicas = tier.replicas + 1
    if tier.capacity is not None and tier.work is not None and tier.bounds is not None and rate is not None:
        replicas = max(replicas, tier.capacity.replicas(rate, tier.work, tier.bounds))
    replicas = min(replicas, max(tier.max_replicas, tier.replicas))
    more = replicas - tier.replicas
    suggestion = f"run {_count(replicas)} instead of {tier.replicas}"
    if not more:
        suggestion = f"raise the most replicas it may have, {tier.max_replicas}: all of them are saturated"
    effect = _effect(tier, replicas, more * tier.gpus_per_replica)
    advice = _recommend(
        tier, RecommendationKind.SCALE_OUT, reasons, suggestion, effect, replicas, breaches.named
    )
    return replace(advice, confidence=min(advice.confidence, _BUSY_CONFIDENCE)) if only_busy else advice


def _up(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    """Slow although neither the GPUs nor the queue are the limit: more replicas would not help."""
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
    # Twice the bandwidth reads the weights in half the time; all-reduces take some of it back.
    faster = latency * 0.6 if latency is not None and tier.gpus_per_replica else None
    effect = Effect(faster, None, gpus)
    return _recommend(
        tier, RecommendationKind.SCALE_UP, reasons, suggestion, effect, tier.replicas, breaches.named
    )


def _failing(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    reasons = tuple(breaches.failing)
    suggestion = "look at the replicas' diagnoses first; one more replica takes over from those that fail"
    replicas = min(tier.replicas + 1, max(tier.max_replicas, tier.replicas))
    effect = Effect(None, None, (replicas - tier.replicas) * tier.gpus_per_replica)
    advice = _recommend(
        tier, RecommendationKind.SCALE_OUT, reasons, suggestion, effect, replicas, breaches.named
    )
    return replace(advice, confidence=min(advice.confidence, _FAILING_CONFIDENCE))


def _down(tier: TierCondition, limits: Thresholds) -> Recommendation:
    gpu, rate = tier.gpu_ratio.fresh or 0.0, tier.requests_per_s.fresh or 0.0
    reasons = (
        f"{tier.load_name} is {gpu:.0%}, under {limits.idle_gpu_ratio:.0%}",
        f"{rate:.2f} requests/s, under {limits.idle_requests_per_s:g}",
    )
    replicas = tier.replicas - 1
    effect = _effect(tier, replicas, 0.0 - tier.gpus_per_replica)
    suggestion = f"run {_count(replicas)} instead of {tier.replicas}"
    return _recommend(tier, RecommendationKind.SCALE_DOWN, reasons, suggestion, effect, replicas)


def _moved(wants: Recommendation, giver: TierCondition) -> Recommendation:
    return replace(
        wants,
        kind=RecommendationKind.REBALANCE,
        reasons=(*wants.reasons, f"no GPU is free, and tier '{giver.tier}' is idle"),
        suggestion=f"take a replica from tier '{giver.tier}' ({giver.replicas} now) and {wants.suggestion}",
        effect=replace(wants.effect, gpus=wants.effect.gpus - giver.gpus_per_replica),
    )


def _recommend(
    tier: TierCondition,
    kind: RecommendationKind,
    reasons: tuple[str, ...],
    suggestion: str,
    effect: Effect,
    replicas: int,
    named: Sequence[Breach] = (),
) -> Recommendation:
    confidence = _confidence(tier, len(reasons))
    return Recommendation(
        tier.tier,
        kind,
        reasons,
        suggestion,
        effect,
        confidence,
        replicas,
        tier.latency_ms.fresh,
        tier.gpus_per_replica,
        tuple(named),
    )
