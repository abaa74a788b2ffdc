"""Gangs to be placed, and the result for each: a placement, or the reasons why there is none.

A gang is one replica of a tier: all of its processes run, or none do. It has ``stages`` (pipeline
parallelism) of ``gpus`` GPUs each (tensor parallelism); the GPUs of one stage are always on one node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controlplane.core.placement.topology import Distance

WHOLE_MILLI = 1000
"""A whole GPU, in thousandths of a GPU."""


@dataclass(frozen=True, slots=True)
class GangShape:
    """The resources that a gang needs. Gangs of one shape are interchangeable. ValueError for values that
    contradict each other."""

    gpus: int = 1
    """GPUs of one stage; 0 means that the stage runs on CPUs."""
    stages: int = 1
    milli_gpu: int = WHOLE_MILLI
    """The share of each GPU in thousandths; below 1000 only for a gang with a single GPU."""
    gpu_memory_bytes: int = 0
    """Memory on each of its GPUs."""
    cpu_milli: int = 0
    """Thousandths of a CPU for one stage."""
    memory_bytes: int = 0
    """Host memory for one stage."""
    models: frozenset[str] = frozenset()
    """Accepted GPU models; empty means any."""
    across_nodes: bool = False
    """Whether stages may be on different nodes if no node has room for all of them."""

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.stages < 1:
            raise ValueError("a gang has at least one stage, and a stage no negative number of GPUs")
        if not 0 < self.milli_gpu <= WHOLE_MILLI:
            raise ValueError(f"milli_gpu is {self.milli_gpu}: it must be between 1 and {WHOLE_MILLI}")
        if self.milli_gpu < WHOLE_MILLI and (self.gpus != 1 or self.stages != 1):
            raise ValueError("a share of a GPU is for one stage with one GPU")
        if min(self.gpu_memory_bytes, self.cpu_milli, self.memory_bytes) < 0:
            raise ValueError("bytes and CPUs can't be negative")

    @property
    def shared(self) -> bool:
        """Whether it takes a share of one GPU."""
        return self.gpus == 1 and self.milli_gpu < WHOLE_MILLI

    @property
    def total_gpus(self) -> int:
        """GPUs of all stages; a share counts as one GPU."""
        return self.gpus * self.stages

    @property
    def total_milli(self) -> int:
        """GPU capacity that it uses, in thousandths of a GPU."""
        return self.total_gpus * self.milli_gpu

    def accepts(self, model: str) -> bool:
        """Whether it can use a GPU of this model."""
        return not self.models or model in self.models


@dataclass(frozen=True, slots=True)
class Gang:
    """One replica to be placed."""

    gang_id: str
    shape: GangShape
    tier: str = ""
    """Replicas of one tier are spread over nodes; empty means no spreading."""


@dataclass(frozen=True, slots=True)
class GangStage:
    """The node and GPUs of one stage."""

    node_id: str
    gpu_uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """The nodes and GPUs of a gang, and why these."""

    gang: Gang
    stages: tuple[GangStage, ...]
    distance: Distance = Distance.SAME
    """Distance between the two GPUs of one stage that are farthest apart."""
    stranded_milli: float = 0.0
    """Growth of the GPU capacity that is expected to remain unused, in thousandths of a GPU."""
    replicas_beside: int = 0
    """Replicas of the same tier that already ran on these nodes."""
    runner_up: str = ""
    """The next best node, if the gang is on one node and would also have fitted another."""
    runner_up_stranded_milli: float = 0.0
    stays: bool = False
    """Whether the gang already runs there."""

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Its nodes without duplicates, in the order of the stages."""
        return tuple(dict.fromkeys(stage.node_id for stage in self.stages))

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        """Its GPUs in the order of the ranks: stage by stage."""
        return tuple(uuid for stage in self.stages for uuid in stage.gpu_uuids)

    @property
    def why(self) -> str:
        """The reason in one sentence, for the user."""
        if self.stays:
            return "runs there"
        shape = self.gang.shape
        parts = [_DISTANCE_TEXT[self.distance]] if shape.gpus > 1 else []
        if len(self.node_ids) > 1:
            parts.append(f"stages on {len(self.node_ids)} nodes: none holds all")
        if shape.gpus:
            parts.append(f"strands {_gpus(self.stranded_milli)}")
        if self.replicas_beside:
            parts.append(f"beside {self.replicas_beside} of its tier")
        text = ", ".join(parts) or "fits"
        if self.runner_up:
            text += f"; next best {self.runner_up}"
            text += f" ({_gpus(self.runner_up_stranded_milli)})" if shape.gpus else ""
        return text


def _gpus(milli: float) -> str:
    return f"{milli / WHOLE_MILLI:+.2f} GPU" if abs(milli) >= WHOLE_MILLI / 200 else "nothing"


_DISTANCE_TEXT = {
    Distance.SAME: "",
    Distance.ISLAND: "in one NVLink island",
    Distance.NUMA: "on one NUMA node, no NVLink island was free",
    Distance.NODE: "across the sockets of one node, nothing closer was free",
    Distance.CLUSTER: "across nodes",
}


class RefusalCause(StrEnum):
    """Why a node can't take a gang."""

    NODE_UNAVAILABLE = "node unavailable"
    NO_SUCH_GPU = "no such GPU"
    GPU_UNAVAILABLE = "GPU unavailable"
    GPU_TOO_SMALL = "GPU too small"
    GPU_BUSY = "GPU busy"
    GPU_MEMORY = "GPU memory taken"
    CPU = "CPU"
    MEMORY = "host memory"
    STAGES = "too few nodes for all stages"


@dataclass(frozen=True, slots=True)
class NodeRefusal:
    """Why one node can't take a gang: the lacking resource, how much the gang needs, and how much the node
    has."""

    node_id: str
    cause: RefusalCause
    needed: int = 0
    available: int = 0
    note: str = ""

    def __str__(self) -> str:
        text = _REFUSAL_TEXT[self.cause].format(needed=_amount(self, self.needed), has=_available(self))
        return f"{self.node_id}: {text}" + (f" ({self.note})" if self.note else "")


_REFUSAL_TEXT = {
    RefusalCause.NODE_UNAVAILABLE: "out of use",
    RefusalCause.NO_SUCH_GPU: "needs {needed} GPUs of an accepted model, has {has}",
    RefusalCause.GPU_UNAVAILABLE: "needs {needed} usable GPUs, has {has}",
    RefusalCause.GPU_TOO_SMALL: "needs {needed} GPUs with enough memory, has {has}",
    RefusalCause.GPU_BUSY: "needs {needed} free GPUs, has {has}",
    RefusalCause.GPU_MEMORY: "needs {needed} GPUs with enough free memory, has {has}",
    RefusalCause.CPU: "needs {needed} CPUs, has {has} free",
    RefusalCause.MEMORY: "needs {needed} GiB of memory, has {has} free",
    RefusalCause.STAGES: "{needed} stages, this node could take {has}, the others too few of the rest",
}


def _amount(refusal: NodeRefusal, value: int) -> str:
    if refusal.cause is RefusalCause.CPU:
        return f"{value / 1000:g}"
    if refusal.cause is RefusalCause.MEMORY:
        return f"{value / 2**30:.1f}"
    return str(value)


def _available(refusal: NodeRefusal) -> str:
    return _amount(refusal, max(0, refusal.available))


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A gang that can't be placed, with the reason for every node."""

    gang: Gang
    refusals: Sequence[NodeRefusal] = field(default=())

    @property
    def why(self) -> str:
        """The causes in one sentence for the user, most frequent first."""
        counts = Counter(str(refusal.cause) for refusal in self.refusals)
        if not counts:
            return "there is no node"
        return ", ".join(f"{cause} on {n} node{'s' * (n > 1)}" for cause, n in counts.most_common())


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """The results for a list of gangs, in the order of that list."""

    placements: tuple[Placement, ...] = ()
    infeasible: tuple[Infeasible, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every gang was placed."""
        return not self.infeasible
