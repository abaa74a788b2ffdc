"""How much of a fleet's GPUs a mix of pods could fill at most before one must be refused.

A linear program over the ways to divide one GPU (cutting stock, by column generation): the fewest GPUs for
the pods of the list, were there arbitrarily many of each in these relations, and CPUs, memory and models no
matter. What is asked for divided by that is the allocation at which a fleet is full. A policy that refuses
nothing can end a little above it: later pods still fill gaps that are left.
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
        worth, pattern = _best_pattern(sizes, -solved.ineqlin.marginals)
        if worth <= 1 + 1e-7:
            break
        patterns.append(pattern)
    return float(100 * (wanted * np.array(sizes)).sum() / WHOLE_MILLI / solved.fun)


def _best_pattern(sizes: Sequence[int], worth: Sequence[float]) -> tuple[float, np.ndarray]:
    """The way to divide a GPU that is worth most, each size at its dual price (a knapsack)."""
    best = np.zeros(WHOLE_MILLI + 1)
    chosen = np.full(WHOLE_MILLI + 1, -1)
    for room in range(1, WHOLE_MILLI + 1):
        best[room] = best[room - 1]
        for i, size in enumerate(sizes):
            if size <= room and best[room - size] + worth[i] > best[room] + 1e-12:
                best[room], chosen[room] = best[room - size] + worth[i], i
    pattern, room = np.zeros(len(sizes)), WHOLE_MILLI
    while room > 0:
        if chosen[room] < 0:
            room -= 1
        else:
            pattern[chosen[room]] += 1
            room -= sizes[chosen[room]]
    return float(best[WHOLE_MILLI]), pattern
