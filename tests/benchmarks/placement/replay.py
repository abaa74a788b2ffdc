"""Replays of workloads on a fleet: the allocated share of the GPUs at the end, by policy."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from controlplane.core.placement.topology import Node
from tests.benchmarks.placement import policies
from tests.benchmarks.placement.trace import Workload, arrivals, fleet_milli, shuffled

POLICIES = ("random", "bestfit", "fgd", "tierplane")
FIRST_SEED = 42


@dataclass(frozen=True)
class Run:
    """One replay."""

    policy: str
    workload: str
    seed: int
    allocation_percent: float


def replay(nodes: Sequence[Node], workload: Workload, policy: str, seed: int) -> Run:
    """Place all arrivals once; none leaves."""
    rng = random.Random(seed)
    size = fleet_milli(nodes)
    order = arrivals(workload.shapes, size, rng)
    placer = _policy(policy, shuffled(nodes, rng), workload, rng)
    placed = sum(shape.total_milli for shape in order if placer.place(shape))
    return Run(policy, workload.name, seed, 100.0 * placed / size)


def _policy(name: str, nodes: Sequence[Node], workload: Workload, rng: random.Random) -> policies.Policy:
    if name == "random":
        return policies.Random(nodes, rng)
    if name == "bestfit":
        return policies.BestFit(nodes)
    if name == "fgd":
        return policies.Fgd(nodes, workload.shapes)
    return policies.Tierplane(nodes)


def replay_all(
    nodes: Sequence[Node],
    workloads: Sequence[Workload],
    names: Sequence[str],
    seeds: int,
    jobs: int,
    progress: Callable[[Run], None],
) -> list[Run]:
    """Every policy on every workload with every seed; the order of the results is fixed."""
    tasks = [
        (workload, name, FIRST_SEED + i) for workload in workloads for name in names for i in range(seeds)
    ]
    if jobs == 1:
        runs = []
        for workload, name, seed in tasks:
            runs.append(replay(nodes, workload, name, seed))
            progress(runs[-1])
        return runs
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(replay, nodes, workload, name, seed): i
            for i, (workload, name, seed) in enumerate(tasks)
        }
        found: dict[int, Run] = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress(found[futures[future]])
    return [found[i] for i in range(len(tasks))]


def summary(runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """One row per policy and workload: mean and standard deviation over the seeds."""
    groups: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        groups.setdefault((run.workload, run.policy), []).append(run.allocation_percent)
    for (workload, policy), values in groups.items():
        yield {
            "policy": policy,
            "workload": workload,
            "seeds": len(values),
            "allocation_percent": round(statistics.mean(values), 2),
            "stddev": round(statistics.stdev(values), 2) if len(values) > 1 else 0.0,
        }
