"""The scaling report: targets with their reasons, recommendations, and how well those turned out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from controlplane.core.autoscaling.overrides import Override
from controlplane.core.recommendations.log import IssuedRecommendation, TrackRecord
from controlplane.core.recommendations.rules import Effect


@dataclass(frozen=True, slots=True)
class TierScalingView:
    """One tier's scaling, as ``/recommendations`` shows it."""

    tier: str
    replicas: int
    """Replicas that serve."""
    target: int
    """Replicas that Serve should run now."""
    wanted: int
    """Replicas that the policy decided on, within the bounds and the GPU budget."""
    reason: str
    mode: str
    """``apply``, ``advise``, ``by hand``, or ``fixed``: no bounds are configured."""
    forecast_per_s: float | None
    each_per_s: float
    """Requests per second that one replica can serve, estimated."""
    cold_start_s: float
    confidence: float
    override: Override | None = None


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """Targets, recommendations, and how well the recommendations turned out."""

    mode: str
    tiers: tuple[TierScalingView, ...]
    recommendations: tuple[IssuedRecommendation, ...]
    record: TrackRecord
    unix_s: float = 0.0
    """When the report was made."""


def as_json_value(report: ScalingReport) -> dict[str, Any]:
    """``{unix_s, mode, tiers: [...], recommendations: [...], record: {...}}``, for ``/recommendations`` and
    ``--json``."""
    return {
        "unix_s": report.unix_s,
        "mode": report.mode,
        "tiers": [asdict(tier) for tier in report.tiers],
        "recommendations": [
            {
                **recommendation_as_json(item),
                "age_s": round(max(0.0, report.unix_s - item.unix_s), 1),
                "applies": item.applies(report.unix_s),
            }
            for item in report.recommendations
        ],
        "record": asdict(report.record),
    }


def recommendation_as_json(item: IssuedRecommendation) -> dict[str, Any]:
    """A recommendation and its outcome, for ``/recommendations`` and ``tierplane simulate --json``."""
    recommendation = item.recommendation
    return {
        "number": item.number,
        "given_unix_s": item.unix_s,
        "held_unix_s": item.again_unix_s,
        "instance": recommendation.instance,
        "type": recommendation.kind.value,
        "reasons": list(recommendation.reasons),
        "suggestion": recommendation.suggestion,
        "replicas": {"then": item.replicas, "suggested": recommendation.replicas},
        "predicted": asdict(recommendation.effect),
        "confidence": recommendation.confidence,
        "applied": item.applied,
        "ended": item.ended,
        "score": asdict(item.score) if item.score is not None else None,
    }


def effect_text(effect: Effect) -> str:
    """The predicted effect, as text."""
    parts = [] if effect.latency_ms is None else [f"{effect.latency_ms:.0f} ms"]
    if effect.attainment is not None:
        parts.append(f"{effect.attainment:.1%} keep the SLO")
    return ", ".join([*parts, f"{effect.gpus:+g} GPUs"])


def outcome_text(item: IssuedRecommendation) -> str:
    """The outcome of a recommendation, as text; empty while it is open."""
    if item.applied is None:
        return ""
    if item.ended:
        return item.ended
    done = "followed" if item.applied else "not followed"
    score = "not measured" if item.score is None else f"{item.score.value:.2f}: {item.score.reason}"
    return f"{done}; {score}"
