"""The last samples, in a bounded ring buffer in memory that is fast to sum.

The samples of one round are one immutable block, so another thread can sum a copy of the list while new
rounds are added."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from controlplane.core.reports.report import GAUGES, SUMS, Instance, ReportSample, Totals

MAX_ROWS: Final = 250_000
"""Maximum number of samples in memory, for all instances together (40 MB). With very many instances the
buffer covers less time; the store has all samples."""

K = TypeVar("K", bound=Hashable)
P = TypeVar("P", bound=Hashable)
_COLUMNS: Final = (*SUMS, *GAUGES)


@dataclass(frozen=True, slots=True)
class SampleRound:
    """All samples taken at the same time."""

    unix_s: int
    instances: tuple[Instance, ...]
    values: NDArray[np.float64]
    """One row per instance, one column per name of :data:`SUMS` and :data:`GAUGES`; NaN means not
    measured."""

    @classmethod
    def of(cls, unix_s: int, samples: Mapping[Instance, ReportSample]) -> SampleRound:
        """The samples as one round."""
        rows = [[_number(getattr(sample, name)) for name in _COLUMNS] for sample in samples.values()]
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(_COLUMNS))
        return cls(unix_s, tuple(samples), values)


class ReportRing:
    """The last ``limit`` rounds, or fewer if they exceed :data:`MAX_ROWS` samples."""

    def __init__(self, limit: int) -> None:
        self._rounds: deque[SampleRound] = deque()
        self._limit = limit
        self._rows = 0

    @property
    def rounds(self) -> tuple[SampleRound, ...]:
        """All rounds, oldest first."""
        return tuple(self._rounds)

    def add(self, new: SampleRound) -> None:
        """Add a round, and drop the oldest beyond the limits."""
        last = self._rounds[-1] if self._rounds else new
        if new.instances == last.instances:
            new = replace(new, instances=last.instances)  # rounds over the same instances share one tuple
        self._rounds.append(new)
        self._rows += len(new.instances)
        while len(self._rounds) > 1 and (len(self._rounds) > self._limit or self._rows > MAX_ROWS):
            self._rows -= len(self._rounds.popleft().instances)


def tally(
    rounds: Sequence[SampleRound],
    choose: Callable[[Instance], K | None],
    part: Callable[[SampleRound], int] = lambda _: 0,
) -> dict[tuple[K, int], Totals]:
    """The samples of the rounds, summed by key and part. ``choose`` maps an instance to its key, or to None
    to leave it out; ``part`` maps a round to its part of the window."""
    keys: dict[K, int] = {}
    known: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    """id() of a round's instances → the chosen rows, and the number of each row's key."""
    values, numbers, parts = [], [], []
    for each in rounds:
        if id(each.instances) not in known:
            chosen = [(row, choose(instance)) for row, instance in enumerate(each.instances)]
            mine = [(row, keys.setdefault(key, len(keys))) for row, key in chosen if key is not None]
            known[id(each.instances)] = (
                np.array([row for row, _ in mine], dtype=np.int64),
                np.array([number for _, number in mine], dtype=np.int64),
            )
        rows, own = known[id(each.instances)]
        values.append(each.values if len(rows) == len(each.instances) else each.values[rows])
        numbers.append(own)
        parts.append(np.full(len(own), part(each), dtype=np.int64))
    if not keys:
        return {}
    pairs, groups = np.unique(
        np.stack([np.concatenate(numbers), np.concatenate(parts)]), axis=1, return_inverse=True
    )
    names = list(keys)
    found = [(names[number], part_number) for number, part_number in pairs.T.tolist()]
    return _added_up(np.concatenate(values), groups.reshape(-1), found)


def _added_up(values: NDArray[np.float64], groups: NDArray[np.int64], keys: Sequence[P]) -> dict[P, Totals]:
    measured = ~np.isnan(values)
    found = {key: Totals() for key in keys}
    for column, name in enumerate(_COLUMNS):
        known = measured[:, column]
        mine, here = values[known, column], groups[known]
        counts = np.bincount(here, minlength=len(keys)).tolist()
        sums = np.bincount(here, mine, len(keys)).tolist()
        highs = np.full(len(keys), -np.inf)
        if name in GAUGES:
            np.maximum.at(highs, here, mine)
        for key, count, total, high in zip(keys, counts, sums, highs.tolist(), strict=True):
            if count:
                found[key].add(name, count, total, high)
    return found


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
