"""What is measured, as values: readings of GPUs, nodes and engines at one moment.

A reading is either the value or a :class:`Missing` with its reason; there is no third thing, so a type
checker makes every consumer say what it does without the value, and nothing that is missing can pass for
a zero. Judging a reading by its age is :mod:`controlplane.core.telemetry.series`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, TypeVar

T = TypeVar("T")


class Absence(StrEnum):
    """Why a reading is missing, for rules; :attr:`Missing.reason` is for people."""

    NO_DRIVER = "no_driver"
    """There is no driver, or it does not answer."""
    NO_PERMISSION = "no_permission"
    NOT_SUPPORTED = "not_supported"
    """This device has no such figure."""
    NO_FUNCTION = "no_function"
    """The installed driver is too old (or too new) for the call."""
    GPU_LOST = "gpu_lost"
    NOT_SAMPLED = "not_sampled"
    """Nothing has been measured yet, or the source does not offer it."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Missing:
    """A reading that could not be had."""

    absence: Absence
    reason: str

    def __bool__(self) -> bool:
        raise TypeError(f"a missing reading is neither true nor false: {self.reason}")


Reading: TypeAlias = T | Missing

NOT_SAMPLED = Missing(Absence.NOT_SAMPLED, "not sampled yet")


class GpuCondition(StrEnum):
    """What the driver says of a GPU as a whole."""

    OK = "ok"
    LOST = "lost"
    """It has fallen off the bus, or a working driver no longer lists it."""
    RESET_REQUIRED = "reset_required"
    UNREADABLE = "unreadable"
    """The driver itself does not answer: nothing is known of the GPU."""


class TopologyLevel(StrEnum):
    """The closest thing that two GPUs of a node share, from near to far (NVML's topology levels)."""

    BOARD = "board"
    SWITCH = "switch"
    """One PCIe switch."""
    SWITCHES = "switches"
    """Several PCIe switches, no host bridge."""
    HOST_BRIDGE = "host_bridge"
    NUMA_NODE = "numa_node"
    SYSTEM = "system"
    """Nothing: the path crosses NUMA nodes."""


class RecoveryAction(StrEnum):
    """What the driver asks for to recover a GPU (nvmlDeviceGpuRecoveryAction_t)."""

    NONE = "none"
    GPU_RESET = "gpu_reset"
    NODE_REBOOT = "node_reboot"
    DRAIN_P2P = "drain_p2p"
    DRAIN_AND_RESET = "drain_and_reset"
    RECOVER_IMEX_DOMAIN = "recover_imex_domain"
    BUS_RESET = "bus_reset"
    SYSTEM_REBOOT = "system_reboot"


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU."""

    pid: int
    memory_bytes: Reading[int]


@dataclass(frozen=True, slots=True)
class MigInstance:
    """A slice of a GPU in MIG mode."""

    uuid: str
    gpu_instance: int
    compute_instance: int
    memory_total_bytes: Reading[int]
    memory_used_bytes: Reading[int]


@dataclass(frozen=True, slots=True)
class NvLink:
    """One NVLink of a GPU."""

    link: int
    active: bool
    remote_bus_id: str
    """PCI address of the other end."""
    remote_uuid: str
    """The GPU at the other end; empty for a switch or a GPU of another node."""
    to_switch: bool


@dataclass(frozen=True, slots=True)
class GpuPeer:
    """How far another GPU of the same node is."""

    uuid: str
    level: TopologyLevel


@dataclass(frozen=True, slots=True)
class RowRemaps:
    """Memory rows that the GPU replaced by spare ones (Ampere and newer)."""

    corrected: int
    uncorrected: int
    pending: bool
    """A remap takes effect at the next reset."""
    failed: bool
    """No spare row was left: the GPU must be replaced."""


@dataclass(frozen=True, slots=True)
class RetiredPages:
    """Memory pages that the driver stopped using (before Ampere)."""

    corrected: int
    uncorrected: int
    pending: bool


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What changes rarely; samples of a GPU share one instance until it does."""

    uuid: str
    """Empty if the GPU was lost before it could be identified."""
    index: int
    """The driver's index, or where it last was."""
    name: Reading[str] = NOT_SAMPLED
    bus_id: Reading[str] = NOT_SAMPLED
    compute_capability: Reading[tuple[int, int]] = NOT_SAMPLED
    slowdown_c: Reading[int] = NOT_SAMPLED
    """Temperature at which the GPU slows itself down."""
    shutdown_c: Reading[int] = NOT_SAMPLED
    power_limit_w: Reading[float] = NOT_SAMPLED
    max_sm_clock_mhz: Reading[int] = NOT_SAMPLED
    max_memory_clock_mhz: Reading[int] = NOT_SAMPLED
    ecc_corrected_aggregate: Reading[int] = NOT_SAMPLED
    """Since the GPU was made."""
    ecc_uncorrected_aggregate: Reading[int] = NOT_SAMPLED
    row_remaps: Reading[RowRemaps] = NOT_SAMPLED
    retired_pages: Reading[RetiredPages] = NOT_SAMPLED
    recovery_action: Reading[RecoveryAction] = NOT_SAMPLED
    nvlinks: Reading[tuple[NvLink, ...]] = NOT_SAMPLED
    peers: Reading[tuple[GpuPeer, ...]] = NOT_SAMPLED
    numa_node: Reading[int] = NOT_SAMPLED
    cpu_affinity: Reading[tuple[int, ...]] = NOT_SAMPLED
    mig_enabled: Reading[bool] = NOT_SAMPLED
    mig_instances: Reading[tuple[MigInstance, ...]] = NOT_SAMPLED


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU at one moment."""

    info: GpuInfo
    condition: GpuCondition
    detail: str = ""
    """Why the condition is not OK."""
    memory_total_bytes: Reading[int] = NOT_SAMPLED
    memory_used_bytes: Reading[int] = NOT_SAMPLED
    """Total less free, so with what the driver keeps for itself."""
    memory_free_bytes: Reading[int] = NOT_SAMPLED
    gpu_ratio: Reading[float] = NOT_SAMPLED
    """The share of time in which a kernel ran, in [0, 1]."""
    memory_ratio: Reading[float] = NOT_SAMPLED
    """The share of time in which memory was read or written, in [0, 1]."""
    temperature_c: Reading[int] = NOT_SAMPLED
    power_w: Reading[float] = NOT_SAMPLED
    sm_clock_mhz: Reading[int] = NOT_SAMPLED
    memory_clock_mhz: Reading[int] = NOT_SAMPLED
    throttle: Reading[tuple[str, ...]] = NOT_SAMPLED
    """Why the clocks are held down, of :data:`THROTTLE_REASONS`; empty: they are not."""
    ecc_corrected: Reading[int] = NOT_SAMPLED
    """Since the driver was loaded or the GPU was reset."""
    ecc_uncorrected: Reading[int] = NOT_SAMPLED
    processes: Reading[tuple[GpuProcess, ...]] = NOT_SAMPLED


THROTTLE_REASONS = (
    "idle",
    "applications_clocks",
    "sw_power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal",
    "hw_thermal",
    "hw_power_brake",
    "display_clocks",
    "board_limit",
    "reliability",
)
"""Names of the bits of nvmlClocksEventReason*, from the lowest."""


@dataclass(frozen=True, slots=True)
class NodeSample:
    """One node at one moment."""

    node_id: str
    epoch: str
    """New with each agent process; ``seq`` counts inside it."""
    seq: int
    unix_s: float
    boot_id: str
    """New with each boot of the machine."""
    cpu_count: int
    cpu_ratio: Reading[float]
    """Busy share of all CPUs since the sample before, in [0, 1]."""
    load_1m: Reading[float]
    memory_total_bytes: Reading[int]
    memory_available_bytes: Reading[int]
    disk_total_bytes: Reading[int]
    disk_free_bytes: Reading[int]
    driver_version: Reading[str]
    xid_watched_gpus: Reading[int] = NOT_SAMPLED
    """GPUs whose XID events the driver reports to the agent."""
    gpus: tuple[GpuSample, ...] = ()
    """Every GPU ever seen by this agent, by index; those that are gone as LOST or UNREADABLE."""
    cost_s: float = 0.0
    """How long taking this sample took."""


class GpuEventKind(StrEnum):
    """What an agent reports outside its samples."""

    XID = "xid"
    UNCORRECTED_ECC = "uncorrected_ecc"
    CORRECTED_ECC = "corrected_ecc"
    LOST = "lost"
    FOUND = "found"
    """A lost GPU answers again."""
    DRIVER_GONE = "driver_gone"
    DRIVER_BACK = "driver_back"


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something happened to a GPU, or to the driver (no ``gpu_uuid``)."""

    node_id: str
    epoch: str
    seq: int
    unix_s: float
    kind: GpuEventKind
    gpu_uuid: str = ""
    code: int = 0
    """The XID number."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EngineSample:
    """What one engine process said of itself at one scrape."""

    endpoint_id: str
    generation: int
    unix_s: float
    scrape_s: float
    """How long the scrape took."""
    error: str = ""
    """Why nothing could be read; then every reading is missing."""
    gauges: tuple[tuple[str, float], ...] = ()
    """Signal name (a field of the engine's metric names) and value; what is not there is missing."""
    counters: tuple[tuple[str, float], ...] = ()
