"""The last samples, in memory: bounded in samples and in all, and added up quickly.

The samples of one look are one block that never changes, so another thread may add up a copy of the list
while new ones come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from controlplane.core.reports.report import GAUGES, SUMS, Instance, ReportSample, Totals

MAX_ROWS: Final = 250_000
"""Samples of all instances together: 40 MB. A very large fleet has fewer of each here; the store has all."""

K = TypeVar("K", bound=Hashable)
P = TypeVar("P", bound=Hashable)
_COLUMNS: Final = (*SUMS, *GAUGES)


@dataclass(frozen=True, slots=True)
class SampleRound:
    """All samples of one moment."""

    unix_s: int
    instances: tuple[Instance, ...]
    values: NDArray[np.float64]
    """Instances × (:data:`SUMS`, :data:`GAUGES`); NaN: not measured."""

    @classmethod
    def of(cls, unix_s: int, samples: Mapping[Instance, ReportSample]) -> SampleRound:
        """The samples as a block."""
        rows = [[_number(getattr(sample, name)) for name in _COLUMNS] for sample in samples.values()]
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(_COLUMNS))
        return cls(unix_s, tuple(samples), values)


class ReportRing:
    """The last ``limit`` looks, as far as :data:`MAX_ROWS` allows."""

    def __init__(self, limit: int, max_rows: int = MAX_ROWS) -> None:
        self._looks: deque[SampleRound] = deque()
        self._limit = limit
        self._max_rows = max_rows
        self._rows = 0

    @property
    def looks(self) -> tuple[SampleRound, ...]:
        """Oldest first."""
        return tuple(self._looks)

    @property
    def rows(self) -> int:
        """Samples of all instances."""
        return self._rows

    def add(self, look: SampleRound) -> None:
        """The newest look; the oldest go."""
        last = self._looks[-1] if self._looks else look
        if look.instances == last.instances:
            look = replace(look, instances=last.instances)  # one tuple for all looks at the same instances
        self._looks.append(look)
        self._rows += len(look.instances)
        while len(self._looks) > 1 and (len(self._looks) > self._limit or self._rows > self._max_rows):
            self._rows -= len(self._looks.popleft().instances)


def tally(
    looks: Sequence[SampleRound],
    choose: Callable[[Instance], K | None],
    part: Callable[[SampleRound], int] = lambda _: 0,
) -> dict[tuple[K, int], Totals]:
    """The looks' samples added up by what ``choose`` makes of their instance (None: left out) and by the
    ``part`` of the window that the look is in."""
    keys: dict[K, int] = {}
    known: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    """By the identity of a look's instances: which rows, and the number of each row's key."""
    values, numbers, parts = [], [], []
    for look in looks:
        if id(look.instances) not in known:
            chosen = [(row, choose(instance)) for row, instance in enumerate(look.instances)]
            mine = [(row, keys.setdefault(key, len(keys))) for row, key in chosen if key is not None]
            known[id(look.instances)] = (
                np.array([row for row, _ in mine], dtype=np.int64),
                np.array([number for _, number in mine], dtype=np.int64),
            )
        rows, own = known[id(look.instances)]
        values.append(look.values if len(rows) == len(look.instances) else look.values[rows])
        numbers.append(own)
        parts.append(np.full(len(own), part(look), dtype=np.int64))
    if not keys:
        return {}
    pairs, groups = np.unique(
        np.stack([np.concatenate(numbers), np.concatenate(parts)]), axis=1, return_inverse=True
    )
    names = list(keys)
    found = [(names[number], place) for number, place in pairs.T.tolist()]
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
