"""Fleets and workloads from files in the format of the openb traces (Alibaba, 2023), and arrivals from them.

Arrivals follow the published experiments of Weng et al. (USENIX ATC'23): the pods of the list in random
order, then pods drawn from the list until they request 130 % of the fleet's GPUs; from a list that requests
more, random pods are removed. No pod leaves. The order of nodes, which breaks ties, is random too.
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
"""GPU capacity that the arrivals request, in relation to the fleet's."""
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Workload:
    """A list of pods."""

    name: str
    shapes: tuple[GangShape, ...]


def read_nodes(path: Path) -> tuple[Node, ...]:
    """The nodes of a CSV file with the columns ``sn, cpu_milli, memory_mib, gpu, model``."""
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
    """The pods of a CSV file with the columns ``name, cpu_milli, memory_mib, num_gpu, gpu_milli`` and
    optionally ``gpu_spec``."""
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
    """The pods in the order of their arrival."""
    order = list(shapes)
    rng.shuffle(order)
    requested = sum(shape.total_milli for shape in order)
    if requested > LOAD * fleet_milli:
        while requested > LOAD * fleet_milli:
            requested -= order.pop(rng.randrange(len(order))).total_milli
        return order
    while True:
        shape = rng.choice(shapes)
        # As published: only the first GPU decides whether the next pod is still added.
        if requested + (shape.milli_gpu if shape.gpus else 0) > LOAD * fleet_milli:
            return order
        requested += shape.total_milli
        order.append(shape)


def fleet_milli(nodes: Sequence[Node]) -> int:
    """The fleet's GPU capacity in thousandths of a GPU."""
    return sum(len(node.gpus) for node in nodes) * WHOLE_MILLI


def shuffled(nodes: Sequence[Node], rng: random.Random) -> tuple[Node, ...]:
    """The same nodes with ids whose order is random."""
    positions = rng.sample(range(len(nodes)), len(nodes))
    return tuple(
        replace(node, node_id=f"{position:05d}-{node.node_id}")
        for position, node in zip(positions, nodes, strict=True)
    )
