"""What people and programs are told of scaling: targets with their reasons, advice, and how good it has
been."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from controlplane.core.autoscaling.overrides import Override
from controlplane.core.recommendations.log import IssuedRecommendation, TrackRecord
from controlplane.core.recommendations.rules import Effect


@dataclass(frozen=True, slots=True)
class TierScalingView:
    """One tier, for people."""

    tier: str
    replicas: int
    """That serve."""
    target: int
    """What Serve is to keep now."""
    wanted: int
    """What the policy would have, inside bounds and budget."""
    reason: str
    mode: str
    """``apply``, ``advise``, ``by hand``, or ``fixed``: no bounds are configured."""
    forecast_per_s: float | None
    each_per_s: float
    """Requests a second that one replica is believed to carry."""
    cold_start_s: float
    confidence: float
    override: Override | None = None


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """Targets, advice, and how good the advice has been."""

    mode: str
    tiers: tuple[TierScalingView, ...]
    advice: tuple[IssuedRecommendation, ...]
    record: TrackRecord


def as_json_value(report: ScalingReport) -> dict[str, Any]:
    """``{mode, tiers: [...], recommendations: [...], record: {...}}``, for ``/recommendations`` and
    ``--json``."""
    return {
        "mode": report.mode,
        "tiers": [asdict(tier) for tier in report.tiers],
        "recommendations": [given_as_json(item) for item in report.advice],
        "record": asdict(report.record),
    }


def given_as_json(item: IssuedRecommendation) -> dict[str, Any]:
    """One advice and what came of it, as ``/recommendations`` and ``tierplane simulate --json`` have it."""
    return {
        "number": item.number,
        "given_unix_s": item.unix_s,
        "held_unix_s": item.again_unix_s,
        "instance": item.advice.instance,
        "type": item.advice.kind.value,
        "reasons": list(item.advice.reasons),
        "suggestion": item.advice.suggestion,
        "replicas": {"then": item.replicas, "suggested": item.advice.replicas},
        "predicted": asdict(item.advice.effect),
        "confidence": item.advice.confidence,
        "applied": item.applied,
        "score": asdict(item.score) if item.score is not None else None,
    }


def effect_text(effect: Effect) -> str:
    """What following an advice would bring, for people."""
    parts = [] if effect.latency_ms is None else [f"{effect.latency_ms:.0f} ms"]
    if effect.attainment is not None:
        parts.append(f"{effect.attainment:.1%} keep the SLO")
    return ", ".join([*parts, f"{effect.gpus:+g} GPUs"])


def judged_text(item: IssuedRecommendation) -> str:
    """What came of an advice, for people; empty: it is not judged yet."""
    if item.applied is None:
        return ""
    done = "followed" if item.applied else "not followed"
    score = "not measured" if item.score is None else f"{item.score.value:.2f}: {item.score.reason}"
    return f"{done}; {score}"
