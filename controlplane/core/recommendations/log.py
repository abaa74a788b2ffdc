"""Stores which recommendations were issued, whether they were followed, and how well they turned out.

A recommendation is open until it is scored; while it is open, the same one is not issued again. Scoring needs
fresh figures: without them it is postponed, up to :data:`PATIENCE` times the usual time, and then the
recommendation is closed without a score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from controlplane.core.recommendations.rules import (
    Recommendation,
    RecommendationKind,
    Score,
    TierCondition,
    score,
)

MAX_RECOMMENDATIONS: Final = 200
"""Maximum number of recommendations in a log, by default."""
PATIENCE: Final = 3.0
STALE_S: Final = 120.0
"""A recommendation that has not applied for this long is not shown as a current one."""
RENEW_S: Final = 30.0
"""The time at which a recommendation last applied is recorded this precisely."""


class IssuedRecommendation(msgspec.Struct, frozen=True, rename={"recommendation": "advice"}):
    """A recommendation and its outcome. The controller's store uses the field names as keys, except
    ``advice`` for ``recommendation``."""

    number: int
    unix_s: float
    recommendation: Recommendation
    replicas: int
    """Replicas that the tier had when it was issued."""
    again_unix_s: float
    """When the recommendation last applied."""
    applied: bool | None = None
    """Whether it was followed; None while it is open."""
    score: Score | None = None
    """None while it is open, or if figures that scoring needs were missing."""
    ended: str = ""
    """Why it was closed before it could be scored: another recommendation for the tier took its place."""

    def applies(self, unix_s: float) -> bool:
        """Whether it is open, and applied within the last :data:`STALE_S`."""
        return self.applied is None and unix_s - self.again_unix_s <= STALE_S


@dataclass(frozen=True, slots=True)
class TrackRecord:
    """How well recommendations turned out."""

    given: int
    """Recommendations that were issued."""
    judged: int
    """Those that have a score."""
    right: int
    mean: float | None
    """Mean score in [0, 1]; None if no recommendation has a score."""


class RecommendationLog:
    """The last recommendations."""

    def __init__(self, limit: int = MAX_RECOMMENDATIONS) -> None:
        self._limit = limit
        self._issued: dict[int, IssuedRecommendation] = {}
        self._open: dict[tuple[str, RecommendationKind], int] = {}
        """(tier, kind) → number of the open recommendation; there is at most one."""
        self._last_number = 0

    @property
    def issued(self) -> tuple[IssuedRecommendation, ...]:
        """All recommendations in the log, oldest first."""
        return tuple(self._issued.values())

    @property
    def open(self) -> tuple[IssuedRecommendation, ...]:
        """The recommendations that have not been scored or closed, oldest first."""
        return tuple(self._issued[number] for number in sorted(self._open.values()))

    def issue(
        self,
        recommendations: Sequence[Recommendation],
        conditions: Mapping[str, TierCondition],
        unix_s: float,
    ) -> tuple[IssuedRecommendation, ...]:
        """Add the recommendations, and return those that were not open already."""
        new = []
        for item in recommendations:
            self._replace_others(item)
            known = self._open.get(_key(item))
            if known is not None:
                self._issued[known] = msgspec.structs.replace(self._issued[known], again_unix_s=unix_s)
                continue
            self._last_number += 1
            replicas = conditions[item.instance].replicas
            issued = IssuedRecommendation(self._last_number, unix_s, item, replicas, unix_s)
            self._add(issued)
            new.append(issued)
        return tuple(new)

    def renew(self, recommendations: Iterable[Recommendation], unix_s: float) -> None:
        """Record that open recommendations apply now."""
        for item in recommendations:
            number = self._open.get(_key(item))
            if number is not None and unix_s - self._issued[number].again_unix_s >= RENEW_S:
                self._issued[number] = msgspec.structs.replace(self._issued[number], again_unix_s=unix_s)

    def _replace_others(self, new: Recommendation) -> None:
        """Close the tier's open recommendations of other kinds: there is one at a time for a tier."""
        for key, number in list(self._open.items()):
            if key[0] == new.instance and key[1] is not new.kind:
                ended = f"replaced by {new.kind.value}"
                self._issued[number] = msgspec.structs.replace(
                    self._issued[number], applied=False, ended=ended
                )
                del self._open[key]

    def score_due(
        self, conditions: Mapping[str, TierCondition], unix_s: float, after_s: float
    ) -> tuple[IssuedRecommendation, ...]:
        """Score the open recommendations that were issued at least ``after_s`` ago, by the present condition
        of their tiers, and return them."""
        closed = []
        for item in self.open:
            # A time in the future was recorded by a clock that was wrong.
            age_s = unix_s - item.unix_s if item.unix_s <= unix_s else PATIENCE * after_s
            if age_s < after_s:
                continue
            condition = conditions.get(item.recommendation.instance)
            applied = condition is not None and _followed(item, condition)
            value = None if condition is None else score(item.recommendation, condition, applied=applied)
            if value is None and age_s < PATIENCE * after_s:
                continue
            done = msgspec.structs.replace(item, applied=applied, score=value)
            self._issued[item.number] = done
            del self._open[_key(item.recommendation)]
            closed.append(done)
        return tuple(closed)

    def record(self) -> TrackRecord:
        """How well the recommendations in the log turned out."""
        scores = [item.score for item in self._issued.values() if item.score is not None]
        right = sum(item.right for item in scores)
        mean = sum(item.value for item in scores) / len(scores) if scores else None
        return TrackRecord(len(self._issued), len(scores), right, mean)

    def restore(self, items: Iterable[IssuedRecommendation]) -> None:
        """Restore the recommendations from before a restart of the controller."""
        for item in sorted(items, key=lambda item: item.number):
            self._add(item)
            self._last_number = max(self._last_number, item.number)

    def _add(self, item: IssuedRecommendation) -> None:
        self._issued[item.number] = item
        if item.applied is None:
            self._open[_key(item.recommendation)] = item.number
        while len(self._issued) > self._limit:
            oldest = self._issued.pop(next(iter(self._issued)))
            if self._open.get(_key(oldest.recommendation)) == oldest.number:
                del self._open[_key(oldest.recommendation)]


def _key(recommendation: Recommendation) -> tuple[str, RecommendationKind]:
    return recommendation.instance, recommendation.kind


def _followed(item: IssuedRecommendation, condition: TierCondition) -> bool:
    """Whether the tier now is as the recommendation suggested."""
    recommendation = item.recommendation
    if recommendation.kind is RecommendationKind.SCALE_UP:
        return condition.gpus_per_replica > recommendation.gpus_per_replica
    if recommendation.replicas >= item.replicas:
        return condition.replicas >= recommendation.replicas > item.replicas
    return condition.replicas <= recommendation.replicas
