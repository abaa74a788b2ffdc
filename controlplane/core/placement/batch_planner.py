"""A place for each of many gangs at once.

Gangs are placed one by one (:class:`~controlplane.core.placement.planner.Planner`), so their order matters.
Large ones first is nearly always good. When some find no place, other orders are tried: gangs that few GPUs
will do for first, then those with few CPUs per GPU; then, from the best order so far, one refused gang at a
time is moved to the front. The order that allocates most wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controlplane.core.placement.fragmentation import ExpectedDemand
from controlplane.core.placement.gangs import Gang, Infeasible, Placement, PlacementPlan
from controlplane.core.placement.planner import SPREAD_MILLI, PlacedCluster, Planner, demand_of

EFFORT = 1000
"""Placements to try at most, beyond those of the first order: about 1 ms each on 10,000 GPUs."""


def plan(
    state: PlacedCluster,
    gangs: Sequence[Gang],
    demand: ExpectedDemand | None = None,
    *,
    spread_milli: int = SPREAD_MILLI,
    effort: int = EFFORT,
) -> PlacementPlan:
    """Place ``gangs`` beside what ``state`` runs; the answers are in the order asked for.

    ``demand`` is what the fleet must expect; by default more of what runs and what is asked for.
    ValueError if two gangs have the same id, or one that runs already.
    """
    if len({gang.gang_id for gang in gangs}) != len(gangs):
        raise ValueError("two gangs have the same id")
    if demand is None:
        demand = demand_of([placement.gang.shape for placement in state.placements], [g.shape for g in gangs])
    expected = demand

    def attempt(order: Sequence[Gang]) -> PlacementPlan:
        planner = Planner(state, expected, spread_milli=spread_milli)
        answers = [planner.place(gang) for gang in order]
        return PlacementPlan(
            tuple(answer for answer in answers if isinstance(answer, Placement)),
            tuple(answer for answer in answers if isinstance(answer, Infeasible)),
        )

    best = _search(attempt, gangs, _scarcity(state, gangs), effort)
    asked = {gang.gang_id: i for i, gang in enumerate(gangs)}
    return PlacementPlan(
        tuple(sorted(best.placements, key=lambda answer: asked[answer.gang.gang_id])),
        tuple(sorted(best.infeasible, key=lambda answer: asked[answer.gang.gang_id])),
    )


def _search(
    attempt: Callable[[Sequence[Gang]], PlacementPlan],
    gangs: Sequence[Gang],
    scarcity: dict[str, int],
    effort: int,
) -> PlacementPlan:
    order = sorted(gangs, key=_size)
    best = attempt(order)
    left = effort // max(1, len(gangs))
    for other in (
        sorted(gangs, key=lambda gang: (scarcity[gang.gang_id], _size(gang))),
        sorted(gangs, key=lambda gang: (_cpu_per_gpu(gang), _size(gang))),
    ):
        if not best.complete and left > 0:
            left -= 1
            answer = attempt(other)
            if _worth(answer) > _worth(best):
                best, order = answer, other
    tried: set[str] = set()
    while left > 0:
        refused = [answer.gang for answer in best.infeasible if answer.gang.gang_id not in tried]
        if not refused:
            break
        left -= 1
        first = min(refused, key=_size)
        tried.add(first.gang_id)
        moved = [first, *(gang for gang in order if gang is not first)]
        answer = attempt(moved)
        if _worth(answer) > _worth(best):
            best, order, tried = answer, moved, set()
    return best


def _worth(answer: PlacementPlan) -> tuple[int, int]:
    """GPU capacity allocated, then gangs placed."""
    return sum(p.gang.shape.total_milli for p in answer.placements), len(answer.placements)


def _size(gang: Gang) -> tuple[int, int, int, int, int, str, str]:
    """Sorts the largest first."""
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


def _scarcity(state: PlacedCluster, gangs: Sequence[Gang]) -> dict[str, int]:
    """By gang: how many GPUs of the fleet are of a model that it accepts."""
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
