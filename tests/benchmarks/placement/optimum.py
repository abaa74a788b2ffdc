"""The distance of plans from the optimum: small fleets, solved exactly as integer programs (HiGHS).

The optimum is the largest GPU capacity that can be allocated to gangs, each completely or not at all. A plan
for all gangs can reach it; placing one gang after the other, without knowing the others, in general can't.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import WHOLE_MILLI, Gang, GangShape, Placement
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.topology import Gpu, Node


@dataclass(frozen=True)
class Case:
    """A small fleet, and more gangs than it has room for."""

    nodes: tuple[Node, ...]
    gangs: tuple[Gang, ...]


def case(seed: int) -> Case:
    """2 to 4 nodes of 2 to 8 GPUs of two models, and gangs for about 120 % of them."""
    rng = random.Random(seed)
    nodes = []
    for n in range(rng.randint(2, 4)):
        model = rng.choice("AAB")
        size = rng.choice((2, 4, 4, 8))
        gpus = tuple(Gpu(f"n{n}/{i}", i, model) for i in range(size))
        nodes.append(Node(f"n{n}", gpus, rng.choice((6, 10, 14)) * 1000 * size, 64 * 2**30 * size))
    total = sum(len(node.gpus) for node in nodes) * WHOLE_MILLI
    gangs: list[Gang] = []
    requested = 0
    while requested < 1.2 * total:
        count = rng.choice((1, 1, 1, 2, 2, 4))
        share = rng.choice((250, 500, 650, 810, WHOLE_MILLI)) if count == 1 else WHOLE_MILLI
        shape = GangShape(
            gpus=count,
            milli_gpu=share,
            cpu_milli=rng.choice((2, 4, 8, 12)) * 1000 * count,
            memory_bytes=rng.choice((16, 32, 64)) * 2**30 * count,
            models=frozenset(rng.choice(((), (), ("A",), ("B",)))),
        )
        requested += shape.total_milli
        gangs.append(Gang(f"g{len(gangs)}", shape))
    return Case(tuple(nodes), tuple(gangs))


def optimum_milli(problem: Case) -> int:
    """The most that can be allocated, in thousandths of a GPU."""
    # Variables: a gang of whole GPUs on a node, a shared gang on a GPU; then «this GPU is used completely».
    slots = [(n, j) for n, node in enumerate(problem.nodes) for j in range(len(node.gpus))]
    choices = [
        (g, n, j)
        for g, gang in enumerate(problem.gangs)
        for n, node in enumerate(problem.nodes)
        if gang.shape.accepts(node.gpus[0].model)
        for j in (range(len(node.gpus)) if gang.shape.shared else (-1,))
    ]
    width = len(choices) + len(slots)
    shapes = [gang.shape for gang in problem.gangs]
    rows: list[np.ndarray] = []
    limits: list[float] = []

    def at_most(limit: float, terms: Sequence[tuple[int, float]]) -> None:
        row = np.zeros(width)
        for column, factor in terms:
            row[column] += factor
        rows.append(row)
        limits.append(limit)

    for g in range(len(shapes)):
        at_most(1, [(c, 1) for c, choice in enumerate(choices) if choice[0] == g])
    for n, node in enumerate(problem.nodes):
        here = [(c, shapes[g]) for c, (g, m, _) in enumerate(choices) if m == n]
        at_most(node.cpu_milli, [(c, shape.cpu_milli) for c, shape in here])
        at_most(node.memory_bytes / 2**30, [(c, shape.memory_bytes / 2**30) for c, shape in here])
        whole = [(c, shape.gpus) for c, shape in here if not shape.shared]
        used = [(len(choices) + s, -1) for s, (m, _) in enumerate(slots) if m == n]
        at_most(0, [*whole, *used])
    for s, slot in enumerate(slots):
        parts = [(c, shapes[g].milli_gpu) for c, (g, m, j) in enumerate(choices) if (m, j) == slot]
        at_most(WHOLE_MILLI, [*parts, (len(choices) + s, WHOLE_MILLI)])
    worth = np.array([-shapes[g].total_milli for g, _, _ in choices] + [0] * len(slots), dtype=float)
    with _quiet():
        solved = milp(
            worth,
            integrality=np.ones(width),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(np.array(rows), ub=np.array(limits)),
            options={"mip_rel_gap": 0.0, "time_limit": 60.0},
        )
    if solved.status != 0:
        raise RuntimeError(f"no proven optimum: {solved.message}")
    return round(-float(solved.fun))


@contextmanager
def _quiet() -> Iterator[None]:
    """Discards standard output at the level of the process, because the solver prints from C."""
    sys.stdout.flush()
    saved, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(devnull)


def planned_milli(problem: Case) -> int:
    """What :func:`plan` allocates, which knows all gangs."""
    result = plan(PlacedCluster(problem.nodes), problem.gangs)
    return sum(placement.gang.shape.total_milli for placement in result.placements)


def online_milli(problem: Case) -> int:
    """What is allocated if the gangs are placed one after the other."""
    planner = Planner(PlacedCluster(problem.nodes))
    results = [planner.place(gang) for gang in problem.gangs]
    return sum(each.gang.shape.total_milli for each in results if isinstance(each, Placement))


def table(cases: int) -> Iterator[dict[str, object]]:
    """Allocation in percent of the optimum: mean, worst, and how often it is reached."""
    problems = [case(seed) for seed in range(cases)]
    best = np.array([optimum_milli(problem) for problem in problems], dtype=float)
    for name, found in (
        ("tierplane, plan", [planned_milli(problem) for problem in problems]),
        ("tierplane, one by one", [online_milli(problem) for problem in problems]),
    ):
        percent = 100 * np.array(found) / best
        yield {
            "policy": name,
            "workload": "small cases",
            "cases": cases,
            "of_optimum_percent": round(float(percent.mean()), 2),
            "worst_percent": round(float(percent.min()), 2),
            "optimal_cases_percent": round(100 * float((percent >= 100 - 1e-9).mean()), 1),
        }
