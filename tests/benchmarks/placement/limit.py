"""The allocation at which a mix of pods fills a fleet's GPUs, so that further pods must be refused.

A linear program over the ways to divide one GPU (cutting stock, by column generation) finds the minimum
number of GPUs for arbitrarily many pods in the proportions of the list, without limits on CPUs, memory and
GPU models. The requested GPU capacity divided by it is the limit. A policy that refuses nothing can end
slightly above the limit, because later pods still fill remaining gaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog

from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape


def limit_percent(shapes: Sequence[GangShape]) -> float:
    """The allocation at which a fleet of any size is full, in percent."""
    demand: Counter[int] = Counter()
    for shape in shapes:
        if shape.gpus:
            demand[shape.milli_gpu] += shape.total_gpus
    sizes = sorted(demand)
    wanted = np.array([demand[size] for size in sizes], dtype=float)
    patterns = [np.eye(len(sizes))[i] * (WHOLE_MILLI // size) for i, size in enumerate(sizes)]
    while True:
        solved = linprog(np.ones(len(patterns)), A_ub=-np.array(patterns).T, b_ub=-wanted, method="highs")
        value, pattern = _best_pattern(sizes, -solved.ineqlin.marginals)
        if value <= 1 + 1e-7:
            break
        patterns.append(pattern)
    return float(100 * (wanted * np.array(sizes)).sum() / WHOLE_MILLI / solved.fun)


def _best_pattern(sizes: Sequence[int], prices: Sequence[float]) -> tuple[float, np.ndarray]:
    """The most valuable way to divide a GPU, with the dual prices as values: a knapsack problem."""
    best = np.zeros(WHOLE_MILLI + 1)
    chosen = np.full(WHOLE_MILLI + 1, -1)
    for milli in range(1, WHOLE_MILLI + 1):
        best[milli] = best[milli - 1]
        for i, size in enumerate(sizes):
            if size <= milli and best[milli - size] + prices[i] > best[milli] + 1e-12:
                best[milli], chosen[milli] = best[milli - size] + prices[i], i
    pattern, left = np.zeros(len(sizes)), WHOLE_MILLI
    while left > 0:
        if chosen[left] < 0:
            left -= 1
        else:
            pattern[chosen[left]] += 1
            left -= sizes[chosen[left]]
    return float(best[WHOLE_MILLI]), pattern
