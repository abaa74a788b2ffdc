"""Placement of many gangs at once.

Gangs are placed one by one (:class:`~controlplane.core.placement.planner.Planner`), so their order matters.
Large gangs first is nearly always a good order. If some gangs can't be placed, other orders are tried: first
gangs that few GPUs suit, then gangs with few CPUs per GPU. Then, starting from the best order so far, one
refused gang at a time is moved to the front. The order that allocates the most GPU capacity wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controlplane.core.placement.fragmentation import ExpectedDemand
from controlplane.core.placement.gangs import Gang, Infeasible, Placement, PlacementPlan
from controlplane.core.placement.planner import PlacedCluster, Planner, demand_of

EFFORT = 1000
"""Maximum number of gangs placed while trying further orders: about 1 ms each on 10,000 GPUs."""


def plan(state: PlacedCluster, gangs: Sequence[Gang], demand: ExpectedDemand | None = None) -> PlacementPlan:
    """Places ``gangs`` besides the placements of ``state``; the results are in the order of ``gangs``.

    ``demand`` is the expected demand; by default it is estimated from the running gangs and ``gangs``.
    ValueError if two gangs have the same id, or a gang has the id of a running one.
    """
    if len({gang.gang_id for gang in gangs}) != len(gangs):
        raise ValueError("two gangs have the same id")
    if demand is None:
        demand = demand_of([placement.gang.shape for placement in state.placements], [g.shape for g in gangs])
    expected = demand

    def attempt(order: Sequence[Gang]) -> PlacementPlan:
        planner = Planner(state, expected)
        results = [planner.place(gang) for gang in order]
        return PlacementPlan(
            tuple(result for result in results if isinstance(result, Placement)),
            tuple(result for result in results if isinstance(result, Infeasible)),
        )

    best = _search(attempt, gangs, _suitable_gpus(state, gangs))
    position = {gang.gang_id: i for i, gang in enumerate(gangs)}
    return PlacementPlan(
        tuple(sorted(best.placements, key=lambda result: position[result.gang.gang_id])),
        tuple(sorted(best.infeasible, key=lambda result: position[result.gang.gang_id])),
    )


def _search(
    attempt: Callable[[Sequence[Gang]], PlacementPlan], gangs: Sequence[Gang], suitable_gpus: dict[str, int]
) -> PlacementPlan:
    order = sorted(gangs, key=_size)
    best = attempt(order)
    left = EFFORT // max(1, len(gangs))
    for other in (
        sorted(gangs, key=lambda gang: (suitable_gpus[gang.gang_id], _size(gang))),
        sorted(gangs, key=lambda gang: (_cpu_per_gpu(gang), _size(gang))),
    ):
        if not best.complete and left > 0:
            left -= 1
            found = attempt(other)
            if _value(found) > _value(best):
                best, order = found, other
    tried: set[str] = set()
    while left > 0:
        refused = [each.gang for each in best.infeasible if each.gang.gang_id not in tried]
        if not refused:
            break
        left -= 1
        first = min(refused, key=_size)
        tried.add(first.gang_id)
        moved = [first, *(gang for gang in order if gang is not first)]
        found = attempt(moved)
        if _value(found) > _value(best):
            best, order, tried = found, moved, set()
    return best


def _value(found: PlacementPlan) -> tuple[int, int]:
    """GPU capacity allocated, then gangs placed."""
    return sum(p.gang.shape.total_milli for p in found.placements), len(found.placements)


def _size(gang: Gang) -> tuple[int, int, int, int, int, str, str]:
    """A sort key that puts the largest gang first."""
    shape = gang.shape
    return (
        -shape.total_milli,
        -shape.gpus,
        -shape.gpu_memory_bytes,
        -shape.cpu_milli,
        -shape.memory_bytes,
        gang.tier,
        gang.gang_id,
    )


def _suitable_gpus(state: PlacedCluster, gangs: Sequence[Gang]) -> dict[str, int]:
    """Gang id → number of GPUs whose model the gang accepts."""
    models: dict[str, int] = {}
    for node in state.nodes:
        for gpu in node.gpus:
            models[gpu.model] = models.get(gpu.model, 0) + 1
    return {
        gang.gang_id: sum(count for model, count in models.items() if gang.shape.accepts(model))
        for gang in gangs
    }


def _cpu_per_gpu(gang: Gang) -> float:
    return gang.shape.cpu_milli * gang.shape.stages / max(1, gang.shape.total_milli)
