"""What a run gave: attainment, GPU hours, percentiles; the same seed gives the same bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from controlplane.core.recommendations.log import IssuedRecommendation, TrackRecord
from controlplane.core.recommendations.views import recommendation_as_json

QUANTILES: Final = (0.5, 0.9, 0.95, 0.99)
START_UNIX_S: Final = 1_767_571_200.0
"""A Monday, 00:00 UTC: the trace's beginning as schedules and recommendations see it."""


@dataclass(slots=True)
class TierRecord:
    """Everything that happened to the requests that were meant for one tier."""

    tier: str
    wait_s: array[float] = field(default_factory=lambda: array("f"))
    ttft_s: array[float] = field(default_factory=lambda: array("f"))
    itl_s: array[float] = field(default_factory=lambda: array("f"))
    total_s: array[float] = field(default_factory=lambda: array("f"))
    arrived: int = 0
    kept: int = 0
    """Requests that kept the SLO."""
    refused: int = 0
    """Answered 429 or 503 at once."""
    expired: int = 0
    """Waited until their deadline."""
    lost: int = 0
    """Lost with an engine and not saved."""
    retried: int = 0
    spilled: int = 0
    """Served by another tier."""
    prompt_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0

    @property
    def attainment(self) -> float:
        """Share of the requests that kept the SLO; 1 if there was none."""
        return self.kept / self.arrived if self.arrived else 1.0


@dataclass(frozen=True, slots=True)
class TierSample:
    """One tier at one moment, for the plot."""

    at_s: float
    arrivals_per_s: float
    held: int
    """Replicas that have a place: starting, ready, draining."""
    ready: int
    in_flight: int
    queued: int
    attainment: float
    """Of the requests that ended since the sample before."""
    waiting: int = 0
    """Replicas that wait for room."""


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    """One that changed a target, or would have if there had been GPUs for it."""

    at_s: float
    tier: str
    direction: str
    before: int
    target: int
    reason: str
    confidence: float


@dataclass(frozen=True, slots=True)
class PlacementRecord:
    """How a tier's replicas fared with places."""

    waited: int
    """Replicas that found no room when they were ordered."""
    waited_s: float
    """All of them together, until they had room, were taken back, or the trace ended."""
    longest_wait_s: float
    waiting: int
    """Replicas that still waited when the trace ended."""
    most_gpus: float
    """The most that were held at once."""


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """The machines of a run."""

    nodes: int
    gpus: float
    """That could be used when the trace began."""
    most_gpus: float
    """The most that were held at once."""
    node_failures: int

    def as_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "nodes": self.nodes,
            "gpus": self.gpus,
            "most_gpus": round(self.most_gpus, 3),
            "node_failures": self.node_failures,
        }


@dataclass(frozen=True, slots=True)
class TierResult:
    """One tier's figures."""

    record: TierRecord
    gpu_hours: float
    replica_hours: float
    cost: float
    starts: int
    failures: int
    samples: tuple[TierSample, ...]
    room: PlacementRecord
    short_rounds: int
    """Decisions that the budget gave fewer replicas than the tier wanted."""

    def as_json(self) -> dict[str, Any]:
        """Figures, rounded to what they are worth."""
        record = self.record
        return {
            "tier": record.tier,
            "requests": record.arrived,
            "slo_attainment": round(record.attainment, 5),
            "gpu_hours": round(self.gpu_hours, 3),
            "replica_hours": round(self.replica_hours, 3),
            "cost": round(self.cost, 2),
            "queue_ms": _percentiles(record.wait_s),
            "ttft_ms": _percentiles(record.ttft_s),
            "itl_ms": _percentiles(record.itl_s),
            "latency_ms": _percentiles(record.total_s),
            "refused": record.refused,
            "expired": record.expired,
            "lost": record.lost,
            "retried": record.retried,
            "spilled": record.spilled,
            "prompt_tokens": record.prompt_tokens,
            "prefix_hit_ratio": round(1 - record.computed_tokens / record.prompt_tokens, 4)
            if record.prompt_tokens
            else 0.0,
            "output_tokens": record.output_tokens,
            "replica_starts": self.starts,
            "replica_failures": self.failures,
            "room": {
                "waited": self.room.waited,
                "waited_s": round(self.room.waited_s, 1),
                "longest_wait_s": round(self.room.longest_wait_s, 1),
                "waiting": self.room.waiting,
                "most_gpus": round(self.room.most_gpus, 3),
                "cut_by_budget": self.short_rounds,
            },
        }


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """One run."""

    policy: str
    seed: int
    simulated_s: float
    tiers: tuple[TierResult, ...]
    decisions: tuple[RecordedDecision, ...]
    """The first that changed a target, or that the budget cut by more than was told."""
    decisions_total: int
    """All of them."""
    recommendations: tuple[IssuedRecommendation, ...]
    """The last that would have been given, oldest first."""
    record: TrackRecord
    """How good all of it was."""
    gpu_budget: float | None = None
    """GPUs that the tiers shared when the trace began; None: nobody counted."""
    cluster: ClusterResult | None = None
    """None: there was always room."""

    def hours_of(self, item: IssuedRecommendation) -> float:
        """When it was given, since the trace's beginning."""
        return (item.unix_s - START_UNIX_S) / 3600

    @property
    def requests(self) -> int:
        """Of all tiers."""
        return sum(tier.record.arrived for tier in self.tiers)

    @property
    def attainment(self) -> float:
        """Over all requests."""
        return sum(tier.record.kept for tier in self.tiers) / self.requests if self.requests else 1.0

    @property
    def gpu_hours(self) -> float:
        """Of all tiers."""
        return sum(tier.gpu_hours for tier in self.tiers)

    def as_json(self) -> dict[str, Any]:
        """The whole run without anything that depends on the machine it ran on. ``decisions`` are changes of
        a target by the policy; ``recommendations`` and ``record`` are what ``/recommendations`` would have
        said."""
        return {
            "policy": self.policy,
            "seed": self.seed,
            "simulated_s": round(self.simulated_s, 3),
            "requests": self.requests,
            "slo_attainment": round(self.attainment, 5),
            "gpu_hours": round(self.gpu_hours, 3),
            "cost": round(sum(tier.cost for tier in self.tiers), 2),
            "gpu_budget": self.gpu_budget,
            "cluster": self.cluster.as_json() if self.cluster is not None else None,
            "tiers": [tier.as_json() for tier in self.tiers],
            "decisions_total": self.decisions_total,
            "decisions": [
                {
                    "at_s": round(entry.at_s, 1),
                    "tier": entry.tier,
                    "move": entry.direction,
                    "replicas": [entry.before, entry.target],
                    "reason": entry.reason,
                    "confidence": round(entry.confidence, 3),
                }
                for entry in self.decisions
            ],
            "recommendations": [recommendation_as_json(item) for item in self.recommendations],
            "record": asdict(self.record),
        }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    names = [f"p{quantile * 100:g}" for quantile in QUANTILES]
    if not len(values):
        return dict.fromkeys(names)
    found = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return {name: round(float(value) * 1e3, 2) for name, value in zip(names, found, strict=True)}
