"""When recommendations are issued and when they are scored. The live controller and the simulator use the
same :class:`Recommender`.

Every ``interval_s`` all recommendations that apply are issued; between those times, only one for a tier that
did not have that trouble at the update before. One that is still open is not issued again
(:class:`~controlplane.core.recommendations.log.RecommendationLog`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.core.recommendations.log import IssuedRecommendation, RecommendationLog
from controlplane.core.recommendations.rules import RecommendationKind, Thresholds, TierCondition, recommend


@dataclass(frozen=True, slots=True)
class RecommendationRules:
    """When recommendations are issued and scored."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    interval_s: float = 300.0
    """How often all recommendations that apply are issued."""
    score_after_s: float = 600.0
    """How long after it was issued a recommendation is scored."""


@dataclass(frozen=True, slots=True)
class RecommendationChanges:
    """The result of one update."""

    issued: tuple[IssuedRecommendation, ...] = ()
    scored: tuple[IssuedRecommendation, ...] = ()


class Recommender:
    """The recommendations for all tiers of one plane."""

    def __init__(self, log: RecommendationLog | None = None) -> None:
        self.log = log or RecommendationLog()
        self._breaches: set[tuple[str, RecommendationKind]] = set()
        self._issued_s: float | None = None

    def update(
        self,
        tiers: Mapping[str, TierCondition],
        rules: RecommendationRules,
        gpus: float | None,
        *,
        now_s: float,
        unix_s: float,
    ) -> RecommendationChanges:
        """Score what is due, then issue what is new. ``gpus`` is what all tiers together may use; None means
        the total is unknown, and then no tier lacks a free GPU."""
        scored = self.log.score_due(tiers, unix_s, rules.score_after_s)
        free = None
        if gpus is not None:
            free = gpus - sum(tier.replicas * tier.gpus_per_replica for tier in tiers.values())
        found = recommend(tuple(tiers.values()), rules.thresholds, free)
        due = self._issued_s is None or now_s - self._issued_s >= rules.interval_s
        if due:
            self._issued_s = now_s
        new = [item for item in found if due or (item.instance, item.kind) not in self._breaches]
        self._breaches = {(item.instance, item.kind) for item in found}
        return RecommendationChanges(self.log.issue(new, tiers, unix_s), scored)
