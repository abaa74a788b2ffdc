"""Reads a cluster from a YAML file, to plan for machines that don't exist yet.

node_types:
  - name: h100-8
    gpu: H100-80G          # a name of `tierplane fit --gpus`, or any other with gpu_memory_gib
    gpus: 8
    nvlink_island: 8       # GPUs per NVLink island; 0: none
    cpus: 192
    memory_gib: 1024
nodes:
  - type: h100-8
    count: 4
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field

from controlplane.config.problems import collect, path_text
from controlplane.config.strict import ConfigFinding, Strict
from controlplane.config.yaml_file import read_yaml
from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.sizing.gpu_models import find_gpu
from controlplane.errors import ConfigError, Problem
from controlplane.models.catalog import gpu_table

_GIB = 1024**3
TypeName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NodeType(Strict):
    """A kind of machine."""

    name: TypeName
    """The name by which ``nodes`` and ``--what-if add-node`` refer to it."""
    gpu: str = ""
    """The GPU model: a name that `tierplane fit --gpus` lists, or any other name with ``gpu_memory_gib``."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of one machine."""
    gpu_memory_gib: Positive | None = None
    """Memory of one GPU; by default that of the table of GPU models."""
    nvlink_island: Count = 0
    """GPUs in each NVLink island, counted from the first GPU; 0 means no NVLink."""
    sockets: Annotated[int, Field(ge=1, le=8)] = 1
    """NUMA nodes, to which the GPUs are assigned in order and in equal numbers."""
    cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """CPUs that tiers may use."""
    memory_gib: Positive
    """Memory that tiers may use."""
    cost_per_hour: Positive | None = None
    """Of one machine, in any unit; `tierplane size` minimises it. By default each GPU counts 1."""

    def findings(self) -> list[ConfigFinding]:
        """Check that machines with GPUs have a GPU model, and that a model outside the table has its
        memory."""
        if self.gpus and not self.gpu:
            return [ConfigFinding(("gpu",), "missing", "name the GPU model of these machines", ("gpus",))]
        if self.gpus and self.gpu_memory_gib is None and find_gpu(gpu_table(), self.gpu) is None:
            remedy = "give gpu_memory_gib, or a name of `tierplane fit --gpus`"
            return [ConfigFinding(("gpu",), f"'{self.gpu}' is not in the table of GPU models", remedy)]
        return []

    @property
    def model(self) -> str:
        """The table's name for the GPU model, or the given name if the table doesn't have it."""
        known = find_gpu(gpu_table(), self.gpu)
        return known.name if known else self.gpu

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        known = find_gpu(gpu_table(), self.gpu)
        if self.gpu_memory_gib is not None or known is None:
            return int((self.gpu_memory_gib or 0) * _GIB)
        return known.usable_bytes

    def node(self, node_id: str, unavailable: str = "", broken: dict[int, str] | None = None) -> Node:
        """One machine of this kind."""
        uuids = [f"{node_id}/gpu{i}" for i in range(self.gpus)]
        return Node(
            node_id,
            tuple(
                Gpu(
                    uuid,
                    i,
                    self.model,
                    self.gpu_bytes,
                    self._peers(i, uuids),
                    i * self.sockets // self.gpus,
                    unavailable=(broken or {}).get(i, ""),
                )
                for i, uuid in enumerate(uuids)
            ),
            round(self.cpus * 1000),
            int(self.memory_gib * _GIB),
            unavailable,
            self.name,
        )

    def _peers(self, i: int, uuids: list[str]) -> frozenset[str]:
        if not self.nvlink_island:
            return frozenset()
        first = i - i % self.nvlink_island
        return frozenset(uuids[first : first + self.nvlink_island]) - {uuids[i]}


class Nodes(Strict):
    """Machines of one kind."""

    type: TypeName
    """One of ``node_types``."""
    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    """How many."""
    name: TypeName | None = None
    """Their name, with a number appended if there are several; by default the name of the type."""
    cordoned: str = ""
    """Why nothing may be placed on them; empty if they may be used."""
    broken_gpus: dict[int, str] = Field(default_factory=dict)
    """GPUs that must not be used: index → reason."""


class ClusterFile(Strict):
    """A cluster."""

    node_types: Annotated[list[NodeType], Field(min_length=1)]
    """Kinds of machines."""
    nodes: list[Nodes]
    """The machines."""

    def findings(self) -> list[ConfigFinding]:
        """Check that names are unique, and that every node refers to a node type."""
        found = []
        types = [kind.name for kind in self.node_types]
        for i, name in enumerate(types):
            if name in types[:i]:
                found.append(
                    ConfigFinding(("node_types", i, "name"), f"two are named '{name}'", "rename one")
                )
        for i, group in enumerate(self.nodes):
            if group.type not in types:
                remedy = f"there is {', '.join(types)}"
                message = f"'{group.type}' is not a node type"
                found.append(ConfigFinding(("nodes", i, "type"), message, remedy, ("node_types",)))
        names = Counter(name for group in self.nodes for name in _numbered(group))
        twice = sorted(name for name, times in names.items() if times > 1)
        if twice:
            message = f"two nodes are named '{twice[0]}'"
            found.append(ConfigFinding(("nodes",), message, "give each group of one type its own 'name'"))
        return found

    def type_named(self, name: str) -> NodeType | None:
        """The node type of that name, or None."""
        return next((kind for kind in self.node_types if kind.name == name), None)

    def to_nodes(self) -> tuple[Node, ...]:
        """All machines."""
        kinds = {kind.name: kind for kind in self.node_types}
        return tuple(
            kinds[group.type].node(name, group.cordoned, group.broken_gpus)
            for group in self.nodes
            for name in _numbered(group)
        )


def _numbered(group: Nodes) -> list[str]:
    stem = group.name or group.type
    return [stem] if group.count == 1 and group.name else [f"{stem}-{i}" for i in range(group.count)]


_STAND_INS = {"node_types": [{"name": "stand-in", "cpus": 1, "memory_gib": 1.0}], "nodes": []}
"""Valid values that replace invalid fields, so that the other fields can still be checked."""


def load_cluster(path: Path) -> ClusterFile:
    """Read a cluster file. ConfigError that lists every problem."""
    file = read_yaml(path)
    problems = list(file.problems)
    for where, problem in collect(ClusterFile, file.values, _STAND_INS):
        problems.append(Problem(path_text(where), problem.message, problem.remedy, file.line(where)))
    if problems:
        raise ConfigError(sorted(problems, key=lambda problem: problem.line), str(path))
    return ClusterFile.model_validate(file.values)
