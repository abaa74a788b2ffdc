"""Results of a run: attainment, GPU hours, percentiles. The same seed gives the same bytes."""

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
"""Monday, 2026-01-05, 00:00 UTC: the beginning of the trace for schedules and recommendations."""


@dataclass(slots=True)
class TierRecord:
    """What happened to the requests for one tier."""

    tier: str
    wait_s: array[float] = field(default_factory=lambda: array("f"))
    ttft_s: array[float] = field(default_factory=lambda: array("f"))
    itl_s: array[float] = field(default_factory=lambda: array("f"))
    total_s: array[float] = field(default_factory=lambda: array("f"))
    arrived: int = 0
    within_slo: int = 0
    """Requests that met the SLO."""
    refused: int = 0
    """Requests that got 429 or 503 at once."""
    expired: int = 0
    """Requests whose deadline passed in the queue."""
    lost: int = 0
    """Requests lost with an engine after the last permitted attempt."""
    retried: int = 0
    spilled: int = 0
    """Requests served by another tier."""
    prompt_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0

    @property
    def attainment(self) -> float:
        """Share of the requests that met the SLO; 1 without requests."""
        return self.within_slo / self.arrived if self.arrived else 1.0


@dataclass(frozen=True, slots=True)
class TierSample:
    """One tier at one time, for the plot."""

    at_s: float
    arrivals_per_s: float
    placed: int
    """Replicas that occupy resources: starting, ready or draining."""
    ready: int
    in_flight: int
    queued: int
    attainment: float
    """Of the requests that ended since the previous sample."""
    waiting: int = 0
    """Replicas that wait for room."""


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    """A decision that changed a target, or would have with more GPUs."""

    at_s: float
    tier: str
    direction: str
    before: int
    target: int
    reason: str
    confidence: float


@dataclass(frozen=True, slots=True)
class PlacementRecord:
    """How long a tier's replicas waited for room, and how many GPUs they used."""

    waited: int
    """Replicas that found no room when they were ordered."""
    waited_s: float
    """Sum of their waits, each until there was room, the replica was cancelled or the trace ended."""
    longest_wait_s: float
    waiting: int
    """Replicas that still waited when the trace ended."""
    most_gpus: float
    """Largest number of GPUs in use at once."""


@dataclass(frozen=True, slots=True)
class ClusterResult:
    """The machines of a run."""

    nodes: int
    gpus: float
    """Usable GPUs when the trace began."""
    most_gpus: float
    """Largest number of GPUs in use at once."""
    node_failures: int

    def as_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "nodes": self.nodes,
            "gpus": self.gpus,
            "most_gpus": round(self.most_gpus, 3),
            "node_failures": self.node_failures,
        }


@dataclass(frozen=True, slots=True)
class TierResult:
    """The results of one tier."""

    record: TierRecord
    gpu_hours: float
    replica_hours: float
    cost: float
    starts: int
    """Replicas that were placed."""
    failures: int
    samples: tuple[TierSample, ...]
    placement: PlacementRecord
    limited_decisions: int
    """Decisions for which the GPU budget allowed fewer replicas than the tier wanted."""

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, with rounded figures."""
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
                "waited": self.placement.waited,
                "waited_s": round(self.placement.waited_s, 1),
                "longest_wait_s": round(self.placement.longest_wait_s, 1),
                "waiting": self.placement.waiting,
                "most_gpus": round(self.placement.most_gpus, 3),
                "cut_by_budget": self.limited_decisions,
            },
        }


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The result of one run."""

    policy: str
    seed: int
    simulated_s: float
    tiers: tuple[TierResult, ...]
    decisions: tuple[RecordedDecision, ...]
    """The first decisions that changed a target, or for which the budget withheld more replicas than in the
    tier's previous recorded decision."""
    decisions_total: int
    """Number of all such decisions."""
    recommendations: tuple[IssuedRecommendation, ...]
    """The last recommendations that would have been issued, oldest first."""
    record: TrackRecord
    """How well all recommendations turned out."""
    gpu_budget: float | None = None
    """GPUs that the tiers shared when the trace began; None if there was no limit."""
    cluster: ClusterResult | None = None
    """None if the scenario had no nodes."""

    @property
    def requests(self) -> int:
        """Of all tiers."""
        return sum(tier.record.arrived for tier in self.tiers)

    @property
    def attainment(self) -> float:
        """Over all requests."""
        return sum(tier.record.within_slo for tier in self.tiers) / self.requests if self.requests else 1.0

    @property
    def gpu_hours(self) -> float:
        """Of all tiers."""
        return sum(tier.gpu_hours for tier in self.tiers)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, without anything that depends on the machine on which the simulation ran.

        ``decisions`` are changes of a target by the policy; ``recommendations`` and ``record`` are what
        ``/recommendations`` would have returned.
        """
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


def hours_since_start(item: IssuedRecommendation) -> float:
    """When a recommendation was issued, in hours since the beginning of the trace."""
    return (item.unix_s - START_UNIX_S) / 3600


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    names = [f"p{quantile * 100:g}" for quantile in QUANTILES]
    if not len(values):
        return dict.fromkeys(names)
    found = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return {name: round(float(value) * 1e3, 2) for name, value in zip(names, found, strict=True)}
