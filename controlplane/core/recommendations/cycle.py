"""When recommendations are issued and scored. The live controller and the simulator use the same
:class:`Recommender`.

All recommendations that apply are issued every ``interval_s``; in between, only those that did not apply at
the previous update. A recommendation that is still open is not issued again
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
    """Time from issuing a recommendation to scoring it."""


@dataclass(frozen=True, slots=True)
class RecommendationChanges:
    """The result of one update."""

    issued: tuple[IssuedRecommendation, ...] = ()
    scored: tuple[IssuedRecommendation, ...] = ()


class Recommender:
    """The recommendations for all tiers of one plane."""

    def __init__(self, log: RecommendationLog | None = None) -> None:
        self.log = log or RecommendationLog()
        self._previous: set[tuple[str, RecommendationKind]] = set()
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
        """Score the recommendations that are due, then issue new ones. ``gpus`` is the number that all tiers
        together may use; None means the total is unknown, and GPUs are assumed to be free."""
        scored = self.log.score_due(tiers, unix_s, rules.score_after_s)
        free = None
        if gpus is not None:
            free = gpus - sum(tier.replicas * tier.gpus_per_replica for tier in tiers.values())
        found = recommend(tuple(tiers.values()), rules.thresholds, free)
        due = self._issued_s is None or now_s - self._issued_s >= rules.interval_s
        if due:
            self._issued_s = now_s
        new = [item for item in found if due or (item.instance, item.kind) not in self._previous]
        self.log.renew(found, unix_s)
        self._previous = {(item.instance, item.kind) for item in found}
        return RecommendationChanges(self.log.issue(new, tiers, unix_s), scored)
