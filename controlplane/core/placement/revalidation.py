"""Checks a plan against the current fleet just before it is carried out. The controller does this before it
begins a migration that needs room elsewhere.

The rules are deliberately implemented a second time, one GPU at a time and in whole numbers, independently of
the arrays with which :mod:`controlplane.core.placement.planner` decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from controlplane.core.placement.gangs import WHOLE_MILLI, Placement
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.topology import Gpu, Node


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why a placement is no longer valid."""

    gang_id: str
    problem: str

    def __str__(self) -> str:
        return f"{self.gang_id}: {self.problem}"


@dataclass(slots=True)
class _Used:
    """Used resources of one fleet, by node id and by GPU UUID."""

    milli: Counter[str] = field(default_factory=Counter)
    gpu_bytes: Counter[str] = field(default_factory=Counter)
    cpu_milli: Counter[str] = field(default_factory=Counter)
    memory_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, placement: Placement) -> None:
        shape = placement.gang.shape
        for stage in placement.stages:
            self.cpu_milli[stage.node_id] += shape.cpu_milli
            self.memory_bytes[stage.node_id] += shape.memory_bytes
            for uuid in stage.gpu_uuids:
                self.milli[uuid] += shape.milli_gpu
                self.gpu_bytes[uuid] += shape.gpu_memory_bytes


def revalidate(placements: Iterable[Placement], state: PlacedCluster) -> tuple[Conflict, ...]:
    """The conflicts of ``placements`` with ``state``, and with each other in this order; empty if all are
    valid.

    A placement with a conflict takes nothing away from those after it.
    """
    used = _Used()
    taken = {placement.gang.gang_id for placement in state.placements}
    for placement in state.placements:
        used.add(placement)
    nodes = {node.node_id: node for node in state.nodes}
    conflicts: list[Conflict] = []
    for placement in placements:
        gang_id = placement.gang.gang_id
        problems = ["it runs already"] if gang_id in taken else []
        problems = problems or _gang_problems(placement) or _node_problems(placement, nodes, used)
        if problems:
            conflicts += [Conflict(gang_id, problem) for problem in problems]
        else:
            taken.add(gang_id)
            used.add(placement)
    return tuple(conflicts)


def _gang_problems(placement: Placement) -> list[str]:
    """A gang must be complete: all its stages, each with all its GPUs, no GPU twice."""
    shape = placement.gang.shape
    problems = []
    if len(placement.stages) != shape.stages:
        problems.append(f"{len(placement.stages)} of {shape.stages} stages are placed")
    if any(len(stage.gpu_uuids) != shape.gpus for stage in placement.stages):
        problems.append(f"a stage doesn't have its {shape.gpus} GPUs")
    if len(set(placement.gpu_uuids)) != len(placement.gpu_uuids):
        problems.append("a GPU is used twice")
    if len(placement.node_ids) > 1 and not shape.across_nodes:
        problems.append("its stages are on different nodes")
    return problems


def _node_problems(placement: Placement, nodes: dict[str, Node], used: _Used) -> list[str]:
    shape = placement.gang.shape
    problems = []
    for node_id, stages in Counter(stage.node_id for stage in placement.stages).items():
        node = nodes.get(node_id)
        if node is None:
            problems.append(f"node {node_id} is gone")
            continue
        if node.unavailable:
            problems.append(f"node {node_id} is out of use: {node.unavailable}")
        if used.cpu_milli[node_id] + stages * shape.cpu_milli > node.cpu_milli and shape.cpu_milli:
            problems.append(f"node {node_id} lacks CPUs")
        if (
            used.memory_bytes[node_id] + stages * shape.memory_bytes > node.memory_bytes
            and shape.memory_bytes
        ):
            problems.append(f"node {node_id} lacks memory")
        gpus = {gpu.uuid: gpu for gpu in node.gpus}
        for stage in placement.stages:
            if stage.node_id == node_id:
                for uuid in stage.gpu_uuids:
                    problems += _gpu_problems(placement, gpus.get(uuid), uuid, node_id, used)
    return problems


def _gpu_problems(placement: Placement, gpu: Gpu | None, uuid: str, node_id: str, used: _Used) -> list[str]:
    shape = placement.gang.shape
    if gpu is None:
        return [f"GPU {uuid} is not on node {node_id}"]
    problems = []
    if gpu.unavailable:
        problems.append(f"GPU {uuid} is out of use: {gpu.unavailable}")
    if not shape.accepts(gpu.model):
        problems.append(f"GPU {uuid} is a {gpu.model or 'GPU of no known model'}")
    if used.milli[uuid] + shape.milli_gpu > WHOLE_MILLI:
        problems.append(f"GPU {uuid} is taken")
    if gpu.memory_bytes and used.gpu_bytes[uuid] + shape.gpu_memory_bytes > gpu.memory_bytes:
        problems.append(f"GPU {uuid} lacks memory")
    return problems
