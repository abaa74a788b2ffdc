"""What was advised, whether it was followed, and how good it turned out to be.

An advice stays open until it is judged; while it is open the same advice is not given again. Judging needs
fresh figures: without them an advice waits, and after :data:`PATIENCE` times its term it ends unjudged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from controlplane.core.recommendations import (
    Effect,
    Kind,
    Recommendation,
    Score,
    TierCondition,
    score,
)

MAX_GIVEN: Final = 200
"""Advice that is remembered."""
PATIENCE: Final = 3.0


@dataclass(frozen=True, slots=True)
class Given:
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
class Record:
    """How good the advice has been."""

    given: int
    judged: int
    right: int
    mean: float | None
    """Of the scores, in [0, 1]; None: none was judged."""


class AdviceBook:
    """All advice of late."""

    def __init__(self) -> None:
        self._given: dict[int, Given] = {}
        self._number = 0

    @property
    def given(self) -> tuple[Given, ...]:
        """Oldest first."""
        return tuple(self._given.values())

    @property
    def open(self) -> tuple[Given, ...]:
        """Not judged yet."""
        return tuple(item for item in self._given.values() if item.applied is None)

    def is_new(self, advice: Recommendation) -> bool:
        """No open advice says the same."""
        return self._same(advice) is None

    def give(
        self, advice: Sequence[Recommendation], conditions: Mapping[str, TierCondition], unix_s: float
    ) -> tuple[Given, ...]:
        """Write it down; the part of it that is new."""
        new = []
        for item in advice:
            known = self._same(item)
            if known is not None:
                self._given[known.number] = replace(known, again_unix_s=unix_s)
                continue
            self._number += 1
            replicas = conditions[item.instance].replicas
            given = Given(self._number, unix_s, item, replicas, unix_s)
            self._given[given.number] = given
            new.append(given)
        while len(self._given) > MAX_GIVEN:
            del self._given[next(iter(self._given))]
        return tuple(new)

    def judge(
        self, conditions: Mapping[str, TierCondition], unix_s: float, after_s: float
    ) -> tuple[Given, ...]:
        """Judge what was given at least ``after_s`` ago by how its tier is now; what was judged."""
        judged = []
        for item in self.open:
            age_s = unix_s - item.unix_s
            if age_s < after_s:
                continue
            condition = conditions.get(item.advice.instance)
            latency = condition.latency_ms.fresh if condition is not None else None
            attainment = condition.attainment.fresh if condition is not None else None
            applied = condition is not None and _followed(item, condition)
            if latency is None or attainment is None:
                if age_s < PATIENCE * after_s:
                    continue
                done = replace(item, applied=applied)
            else:
                value = score(item.advice, applied=applied, latency_ms=latency, attainment=attainment)
                done = replace(item, applied=applied, score=value)
            self._given[item.number] = done
            judged.append(done)
        return tuple(judged)

    def record(self) -> Record:
        """How good it has been."""
        scores = [item.score for item in self._given.values() if item.score is not None]
        right = sum(item.right for item in scores)
        mean = sum(item.value for item in scores) / len(scores) if scores else None
        return Record(len(self._given), len(scores), right, mean)

    def values(self) -> dict[str, Any]:
        """By number, as JSON values, for the store."""
        return {str(number): asdict(item) for number, item in self._given.items()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """What was stored before."""
        for value in sorted(values.values(), key=lambda item: item["number"]):
            advice = value["advice"]
            kept = Given(
                **{
                    **value,
                    "advice": Recommendation(
                        **{
                            **advice,
                            "kind": Kind(advice["kind"]),
                            "reasons": tuple(advice["reasons"]),
                            "effect": Effect(**advice["effect"]),
                        }
                    ),
                    "score": Score(**value["score"]) if value["score"] is not None else None,
                }
            )
            self._given[kept.number] = kept
            self._number = max(self._number, kept.number)

    def _same(self, advice: Recommendation) -> Given | None:
        return next(
            (
                item
                for item in self.open
                if (item.advice.instance, item.advice.kind) == (advice.instance, advice.kind)
            ),
            None,
        )


def _followed(item: Given, condition: TierCondition) -> bool:
    """Has the tier become what was suggested?"""
    if item.advice.kind is Kind.SCALE_UP:
        return condition.gpus_per_replica > item.advice.gpus_per_replica
    if item.advice.replicas >= item.replicas:
        return condition.replicas >= item.advice.replicas > item.replicas
    return condition.replicas <= item.advice.replicas
