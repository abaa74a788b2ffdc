"""What was advised, whether it was followed, and how good it turned out to be.

An advice stays open until it is judged; while it is open the same advice is not given again. Judging needs
fresh figures: without them an advice waits, and after :data:`PATIENCE` times its term it ends unjudged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from controlplane.core.json_values import from_value, to_value
from controlplane.core.recommendations.rules import (
    Recommendation,
    RecommendationKind,
    Score,
    TierCondition,
    score,
)

MAX_GIVEN: Final = 200
"""Advice that is remembered, unless said otherwise."""
PATIENCE: Final = 3.0


@dataclass(frozen=True, slots=True)
class IssuedRecommendation:
    """One advice and what came of it."""

    number: int
    unix_s: float
    advice: Recommendation
    replicas: int
    """That the tier had then."""
    again_unix_s: float
    """When it last still held."""
    applied: bool | None = None
    """None: not judged yet."""
    score: Score | None = None
    """None with ``applied`` set: there were no figures to judge it by."""


@dataclass(frozen=True, slots=True)
class TrackRecord:
    """How good the advice has been."""

    given: int
    judged: int
    right: int
    mean: float | None
    """Of the scores, in [0, 1]; None: none was judged."""


class RecommendationLog:
    """All advice of late."""

    def __init__(self, most: int = MAX_GIVEN) -> None:
        """``most`` is how much is remembered."""
        self._most = most
        self._given: dict[int, IssuedRecommendation] = {}
        self._open: dict[tuple[str, RecommendationKind], int] = {}
        """Tier and kind → the number of what is not judged yet: at most one of each."""
        self._number = 0

    @property
    def given(self) -> tuple[IssuedRecommendation, ...]:
        """Oldest first."""
        return tuple(self._given.values())

    @property
    def open(self) -> tuple[IssuedRecommendation, ...]:
        """Not judged yet."""
        return tuple(self._given[number] for number in sorted(self._open.values()))

    def give(
        self, advice: Sequence[Recommendation], conditions: Mapping[str, TierCondition], unix_s: float
    ) -> tuple[IssuedRecommendation, ...]:
        """Write it down; the part of it that is new."""
        new = []
        for item in advice:
            known = self._open.get(_key(item))
            if known is not None:
                self._given[known] = replace(self._given[known], again_unix_s=unix_s)
                continue
            self._number += 1
            replicas = conditions[item.instance].replicas
            given = IssuedRecommendation(self._number, unix_s, item, replicas, unix_s)
            self._write(given)
            new.append(given)
        return tuple(new)

    def judge(
        self, conditions: Mapping[str, TierCondition], unix_s: float, after_s: float
    ) -> tuple[IssuedRecommendation, ...]:
        """Judge what was given at least ``after_s`` ago by how its tier is now; what was judged."""
        judged = []
        for item in self.open:
            age_s = unix_s - item.unix_s
            if age_s < after_s:
                continue
            condition = conditions.get(item.advice.instance)
            applied = condition is not None and _followed(item, condition)
            value = None if condition is None else score(item.advice, condition, applied=applied)
            if value is None and age_s < PATIENCE * after_s:
                continue
            done = replace(item, applied=applied, score=value)
            self._given[item.number] = done
            del self._open[_key(item.advice)]
            judged.append(done)
        return tuple(judged)

    def record(self) -> TrackRecord:
        """How good it has been."""
        scores = [item.score for item in self._given.values() if item.score is not None]
        right = sum(item.right for item in scores)
        mean = sum(item.value for item in scores) / len(scores) if scores else None
        return TrackRecord(len(self._given), len(scores), right, mean)

    def values(self) -> dict[str, Any]:
        """By number, as JSON values, for the store."""
        return {str(number): to_value(item) for number, item in self._given.items()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """What was stored before."""
        for item in sorted(
            (from_value(IssuedRecommendation, each) for each in values.values()), key=lambda i: i.number
        ):
            self._write(item)
            self._number = max(self._number, item.number)

    def _write(self, item: IssuedRecommendation) -> None:
        self._given[item.number] = item
        if item.applied is None:
            self._open[_key(item.advice)] = item.number
        while len(self._given) > self._most:
            gone = self._given.pop(next(iter(self._given)))
            if self._open.get(_key(gone.advice)) == gone.number:
                del self._open[_key(gone.advice)]


def _key(advice: Recommendation) -> tuple[str, RecommendationKind]:
    return advice.instance, advice.kind


def _followed(item: IssuedRecommendation, condition: TierCondition) -> bool:
    """Has the tier become what was suggested?"""
    if item.advice.kind is RecommendationKind.SCALE_UP:
        return condition.gpus_per_replica > item.advice.gpus_per_replica
    if item.advice.replicas >= item.replicas:
        return condition.replicas >= item.advice.replicas > item.replicas
    return condition.replicas <= item.advice.replicas
