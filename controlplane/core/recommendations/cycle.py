"""When advice is given and when it is judged; the live controller and the simulator call the same
:class:`Recommender`.

All advice that holds is given every so often, and at once what names a tier that was not in that trouble a
look before. What is open already is not given anew
(:class:`~controlplane.core.recommendations.log.RecommendationLog`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.core.recommendations.log import IssuedRecommendation, RecommendationLog
from controlplane.core.recommendations.rules import RecommendationKind, Thresholds, TierCondition, advise


@dataclass(frozen=True, slots=True)
class RecommendationRules:
    """When there is advice, and when it is judged."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    interval_s: float = 300.0
    """All advice that holds is given so often."""
    score_after_s: float = 600.0
    """It is judged by how its tier is so long after."""


@dataclass(frozen=True, slots=True)
class RecommendationChanges:
    """What one look brought."""

    new: tuple[IssuedRecommendation, ...] = ()
    judged: tuple[IssuedRecommendation, ...] = ()


class Recommender:
    """The advice about all tiers; one for each control plane."""

    def __init__(self, book: RecommendationLog | None = None) -> None:
        self.book = book or RecommendationLog()
        self._breaches: set[tuple[str, RecommendationKind]] = set()
        self._given_s: float | None = None

    def look(
        self,
        tiers: Mapping[str, TierCondition],
        rules: RecommendationRules,
        gpus: float | None,
        *,
        now_s: float,
        unix_s: float,
    ) -> RecommendationChanges:
        """Judge what is due, then give what is new. ``gpus`` is what all tiers together may hold; None:
        nobody counts, and then there is one for everybody."""
        judged = self.book.judge(tiers, unix_s, rules.score_after_s)
        free = None
        if gpus is not None:
            free = gpus - sum(tier.replicas * tier.gpus_per_replica for tier in tiers.values())
        found = advise(tuple(tiers.values()), rules.thresholds, free)
        due = self._given_s is None or now_s - self._given_s >= rules.interval_s
        if due:
            self._given_s = now_s
        fresh = [item for item in found if due or (item.instance, item.kind) not in self._breaches]
        self._breaches = {(item.instance, item.kind) for item in found}
        return RecommendationChanges(self.book.give(fresh, tiers, unix_s), judged)
