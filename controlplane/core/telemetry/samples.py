"""Measurements as values: readings of GPUs, nodes and engines at one moment.

A reading is either the value or a :class:`Missing` with its reason. A type checker therefore forces every
user of a reading to handle its absence, and a missing value can never pass for zero. Whether a reading of a
given age may still be used is decided in :mod:`controlplane.core.telemetry.series`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, TypeVar

T = TypeVar("T")
D = TypeVar("D")


class Absence(StrEnum):
    """Why a reading is missing, for use in rules. The text for users is :attr:`Missing.reason`."""

    NO_DRIVER = "no_driver"
    """There is no driver, or it does not respond."""
    NO_PERMISSION = "no_permission"
    NOT_SUPPORTED = "not_supported"
    """This device never has the value."""
    NO_FUNCTION = "no_function"
    """The installed driver does not have the NVML function: it is too old or too new."""
    GPU_LOST = "gpu_lost"
    NOT_SAMPLED = "not_sampled"
    """Nothing has been measured yet, or the source does not offer it."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Missing:
    """A reading without a value."""

    absence: Absence
    reason: str

    def __bool__(self) -> bool:
        raise TypeError(f"a missing reading is neither true nor false: {self.reason}")


Reading: TypeAlias = T | Missing

NOT_SAMPLED = Missing(Absence.NOT_SAMPLED, "not sampled yet")


def value_or(reading: Reading[T], default: D) -> T | D:
    """The reading's value, or ``default`` if it is missing."""
    return default if isinstance(reading, Missing) else reading


class GpuCondition(StrEnum):
    """What the driver reports about a GPU as a whole."""

    OK = "ok"
    LOST = "lost"
    """It has fallen off the bus, or a working driver no longer lists it."""
    RESET_REQUIRED = "reset_required"
    UNREADABLE = "unreadable"
    """The driver itself does not respond, so nothing is known about the GPU."""


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
class NvLink:
    """One NVLink of a GPU."""

    active: bool
    remote_uuid: str
    """The GPU at the other end; empty for a switch or a GPU of another node."""
    to_switch: bool


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
class GpuInfo:
    """Facts about a GPU that rarely change. Successive samples share one instance until a fact changes."""

    uuid: str
    """Empty if the GPU was lost before it could be identified."""
    index: int
    """The driver's index, or the last one if the GPU is gone."""
    name: Reading[str] = NOT_SAMPLED
    compute_capability: Reading[tuple[int, int]] = NOT_SAMPLED
    slowdown_c: Reading[int] = NOT_SAMPLED
    """Temperature at which the GPU slows itself down."""
    shutdown_c: Reading[int] = NOT_SAMPLED
    """Temperature at which it shuts itself down."""
    row_remaps: Reading[RowRemaps] = NOT_SAMPLED
    page_retirement_pending: Reading[bool] = NOT_SAMPLED
    """Whether the driver will stop using a memory page at the next reset (before Ampere)."""
    recovery_action: Reading[RecoveryAction] = NOT_SAMPLED
    nvlinks: Reading[tuple[NvLink, ...]] = NOT_SAMPLED
    numa_node: Reading[int] = NOT_SAMPLED
    mig_enabled: Reading[bool] = NOT_SAMPLED


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU at one moment."""

    info: GpuInfo
    condition: GpuCondition
    detail: str = ""
    """Why the condition is not OK."""
    memory_total_bytes: Reading[int] = NOT_SAMPLED
    memory_used_bytes: Reading[int] = NOT_SAMPLED
    """Total minus free, so it includes what the driver reserves for itself."""
    memory_free_bytes: Reading[int] = NOT_SAMPLED
    gpu_ratio: Reading[float] = NOT_SAMPLED
    """Share of time in which a kernel ran, in [0, 1]."""
    temperature_c: Reading[int] = NOT_SAMPLED
    power_w: Reading[float] = NOT_SAMPLED
    sm_clock_mhz: Reading[int] = NOT_SAMPLED
    throttle: Reading[tuple[str, ...]] = NOT_SAMPLED
    """Why the clocks are reduced, from :data:`THROTTLE_REASONS`; empty if they are not."""
    ecc_corrected: Reading[int] = NOT_SAMPLED
    """Since the driver was loaded or the GPU was reset."""
    ecc_uncorrected: Reading[int] = NOT_SAMPLED
    """Since the driver was loaded or the GPU was reset."""


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
"""Names of the bits of nvmlClocksEventReason*, lowest bit first."""


@dataclass(frozen=True, slots=True)
class DiskSample:
    """One file system."""

    path: str
    """The folder for which it was measured."""
    total_bytes: int
    free_bytes: int
    """What a process without special rights may still write."""


@dataclass(frozen=True, slots=True)
class NodeSample:
    """One node at one moment."""

    node_id: str
    epoch: str
    """A random id of the agent process; ``seq`` counts within it."""
    seq: int
    unix_s: float
    boot_id: str
    """Changes with each boot of the machine."""
    cpu_count: int
    cpu_ratio: Reading[float]
    """Busy share of all CPUs since the previous sample, in [0, 1]."""
    memory_total_bytes: Reading[int]
    memory_available_bytes: Reading[int]
    disk_free_bytes: Reading[int]
    """Of the first of ``disks``."""
    driver_version: Reading[str]
    xid_watched_gpus: Reading[int] = NOT_SAMPLED
    """Number of GPUs whose XID events the driver reports to the agent."""
    gpus: tuple[GpuSample, ...] = ()
    """Every GPU that this agent has ever seen, by index; those that are gone as LOST or UNREADABLE."""
    cost_s: float = 0.0
    """How long it took to take this sample."""
    load_1m: Reading[float] = NOT_SAMPLED
    """Processes that run or wait for a CPU, averaged over the last minute."""
    disks: tuple[DiskSample, ...] = ()
    """The file systems of the run folder, of temporary files and of models, each once."""
    hostname: str = ""


class GpuEventKind(StrEnum):
    """What an agent reports in addition to its samples."""

    XID = "xid"
    UNCORRECTED_ECC = "uncorrected_ecc"
    LOST = "lost"
    DRIVER_GONE = "driver_gone"
    DRIVER_BACK = "driver_back"


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something happened to a GPU, or to the driver if ``gpu_uuid`` is empty."""

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
    """One scrape of one engine process's metrics."""

    endpoint_id: str
    generation: int
    unix_s: float
    scrape_s: float
    """How long the scrape took."""
    error: str = ""
    """Why nothing could be read; then every reading is missing."""
    gauges: tuple[tuple[str, float], ...] = ()
    """Signal name (a field of the engine's metric names) and value; a signal not listed is missing."""
    counters: tuple[tuple[str, float], ...] = ()
    """As ``gauges``."""
