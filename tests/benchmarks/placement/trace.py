"""Fleets and workloads from files of the openb traces' format (Alibaba, 2023), and arrivals made of them.

Arrivals follow the published experiments of Weng et al. (USENIX ATC'23): the pods of the list in random
order, then pods drawn from the list until they ask for 130 % of the fleet's GPUs; a list that asks for more
loses pods at random. Nobody leaves. The order of nodes, which breaks ties, is random too.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape
from controlplane.core.placement.topology import Gpu, Node

LOAD = 1.3
"""Arrivals in relation to the fleet's GPUs."""
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Workload:
    """A list of pods."""

    name: str
    shapes: tuple[GangShape, ...]


def read_nodes(path: Path) -> tuple[Node, ...]:
    """Columns ``sn, cpu_milli, memory_mib, gpu, model``."""
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            Node(
                row["sn"],
                tuple(Gpu(f"{row['sn']}/{i}", i, row["model"]) for i in range(int(row["gpu"]))),
                int(row["cpu_milli"]),
                int(row["memory_mib"]) * _MIB,
            )
            for row in csv.DictReader(file)
        )


def read_pods(path: Path) -> Workload:
    """Columns ``name, cpu_milli, memory_mib, num_gpu, gpu_milli`` and, if there, ``gpu_spec``."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["name"])
    return Workload(path.stem.removeprefix("openb_pod_list_"), tuple(_shape(row) for row in rows))


def _shape(row: dict[str, str]) -> GangShape:
    gpus = int(row["num_gpu"])
    return GangShape(
        gpus=gpus,
        milli_gpu=min(int(row["gpu_milli"]), WHOLE_MILLI) if gpus == 1 else WHOLE_MILLI,
        cpu_milli=int(row["cpu_milli"]),
        memory_bytes=int(row["memory_mib"]) * _MIB,
        models=frozenset(filter(None, (row.get("gpu_spec") or "").split("|"))),
    )


def arrivals(shapes: Sequence[GangShape], fleet_milli: int, rng: random.Random) -> list[GangShape]:
    """The pods in the order they come."""
    order = list(shapes)
    rng.shuffle(order)
    asked = sum(shape.total_milli for shape in order)
    if asked > LOAD * fleet_milli:
        while asked > LOAD * fleet_milli:
            asked -= order.pop(rng.randrange(len(order))).total_milli
        return order
    while True:
        shape = rng.choice(shapes)
        # As published: whether the next one still goes in is judged by its first GPU only.
        if asked + (shape.milli_gpu if shape.gpus else 0) > LOAD * fleet_milli:
            return order
        asked += shape.total_milli
        order.append(shape)


def fleet_milli(nodes: Sequence[Node]) -> int:
    """The fleet's GPUs in thousandths."""
    return sum(len(node.gpus) for node in nodes) * WHOLE_MILLI


def shuffled(nodes: Sequence[Node], rng: random.Random) -> tuple[Node, ...]:
    """The same nodes with ids whose order is random."""
    places = rng.sample(range(len(nodes)), len(nodes))
    return tuple(
        replace(node, node_id=f"{place:05d}-{node.node_id}")
        for place, node in zip(places, nodes, strict=True)
    )
