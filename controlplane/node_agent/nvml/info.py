"""The figures of a GPU that change rarely: limits, lifetime counters, links, topology, MIG instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import pynvml

from controlplane.core.telemetry.samples import (
    Absence,
    GpuInfo,
    GpuPeer,
    MigInstance,
    Missing,
    NvLink,
    Reading,
    RecoveryAction,
    RetiredPages,
    RowRemaps,
    TopologyLevel,
)
from controlplane.node_agent.nvml.calls import LASTING_CODES, GpuLostError, missing_for, read

T = TypeVar("T")
R = TypeVar("R")

_MASK_WORDS: Final = 16
"""Words of 64 bits in an affinity mask: 1,024 CPUs or NUMA nodes."""

_LEVELS: Final = {
    pynvml.NVML_TOPOLOGY_INTERNAL: TopologyLevel.BOARD,
    pynvml.NVML_TOPOLOGY_SINGLE: TopologyLevel.SWITCH,
    pynvml.NVML_TOPOLOGY_MULTIPLE: TopologyLevel.SWITCHES,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: TopologyLevel.HOST_BRIDGE,
    pynvml.NVML_TOPOLOGY_NODE: TopologyLevel.NUMA_NODE,
    pynvml.NVML_TOPOLOGY_SYSTEM: TopologyLevel.SYSTEM,
}
_RECOVERY: Final[tuple[RecoveryAction, ...]] = tuple(RecoveryAction)
_SWITCH_TYPE: Final = pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH


def read_info(index: int, uuid: str, handle: Any, handles: Mapping[str, Any]) -> GpuInfo:
    """Everything slow about one GPU; ``handles`` are all GPUs that answer, by UUID.

    Raises GpuLostError or DriverGoneError.
    """

    def ask(what: str, call: Callable[..., T], *args: object) -> Reading[T]:
        return read(what, call, handle, *args)

    bus_id = ask("PCI address", _bus_id)
    corrected, uncorrected = (
        ask("lifetime ECC errors", pynvml.nvmlDeviceGetTotalEccErrors, kind, pynvml.NVML_AGGREGATE_ECC)
        for kind in (pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
    )
    shutdown_c, slowdown_c = (
        ask("temperature threshold", pynvml.nvmlDeviceGetTemperatureThreshold, kind)
        for kind in (pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
    )
    mig_enabled = ask("MIG mode", lambda device: bool(pynvml.nvmlDeviceGetMigMode(device)[0]))
    return GpuInfo(
        uuid=uuid,
        index=index,
        name=ask("name", pynvml.nvmlDeviceGetName),
        bus_id=bus_id,
        compute_capability=ask("compute capability", pynvml.nvmlDeviceGetCudaComputeCapability),
        slowdown_c=slowdown_c,
        shutdown_c=shutdown_c,
        power_limit_w=ask(
            "power limit", lambda device: pynvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000
        ),
        max_sm_clock_mhz=ask("max SM clock", pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        max_memory_clock_mhz=ask("max memory clock", pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
        ecc_corrected_aggregate=corrected,
        ecc_uncorrected_aggregate=uncorrected,
        row_remaps=ask("remapped rows", _row_remaps),
        retired_pages=ask("retired pages", _retired_pages),
        recovery_action=_recovery_action(handle),
        nvlinks=ask("NVLinks", _nvlinks, handles),
        peers=ask("topology", _peers, uuid, handles),
        numa_node=_numa_node(handle, bus_id),
        cpu_affinity=ask("CPU affinity", _cpu_affinity),
        mig_enabled=mig_enabled,
        mig_instances=ask("MIG instances", _mig_instances) if mig_enabled is True else _no_mig(mig_enabled),
    )


def _bus_id(handle: Any) -> str:
    return _text(pynvml.nvmlDeviceGetPciInfo(handle).busId)


def _text(value: str | bytes) -> str:
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else value).upper()


def _row_remaps(handle: Any) -> RowRemaps:
    corrected, uncorrected, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return RowRemaps(corrected, uncorrected, bool(pending), bool(failed))


def _retired_pages(handle: Any) -> RetiredPages:
    corrected, uncorrected = (
        len(pynvml.nvmlDeviceGetRetiredPages(handle, cause))
        for cause in (
            pynvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS,
            pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR,
        )
    )
    return RetiredPages(corrected, uncorrected, bool(pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle)))


def _recovery_action(handle: Any) -> Reading[RecoveryAction]:
    what = "recovery action"
    values = read(what, pynvml.nvmlDeviceGetFieldValues, handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if isinstance(values, Missing):
        return values
    if values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return missing_for(what, pynvml.NVMLError(values[0].nvmlReturn))
    action = int(values[0].value.uiVal)
    if action >= len(_RECOVERY):
        return Missing(Absence.ERROR, f"{what}: the driver says {action}, which is none we know")
    return _RECOVERY[action]


def _nvlinks(handle: Any, handles: Mapping[str, Any]) -> tuple[NvLink, ...]:
    """Every link that the GPU has; numbers past its last one are refused as invalid."""
    by_bus_id = {}
    for uuid, other in handles.items():
        bus_id = _quiet(_bus_id, other)
        if bus_id is not None:
            by_bus_id[bus_id] = uuid
    links = []
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            active = bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
        except (pynvml.NVMLError_InvalidArgument, pynvml.NVMLError_NotSupported):
            if link == 0:
                raise
            break
        remote = (
            _quiet(lambda at=link: _text(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, at).busId)) or ""
        )
        kind = _quiet(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        links.append(NvLink(link, active, remote, by_bus_id.get(remote, ""), kind == _SWITCH_TYPE))
    return tuple(links)


def _peers(handle: Any, uuid: str, handles: Mapping[str, Any]) -> tuple[GpuPeer, ...]:
    peers = []
    for other_uuid, other in handles.items():
        if other_uuid == uuid:
            continue
        try:
            level = pynvml.nvmlDeviceGetTopologyCommonAncestor(handle, other)
        except pynvml.NVMLError as error:
            if error.value in LASTING_CODES or error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                raise
            continue  # the other one is lost: no distance to it
        if level in _LEVELS:
            peers.append(GpuPeer(other_uuid, _LEVELS[level]))
    return tuple(peers)


def _cpu_affinity(handle: Any) -> tuple[int, ...]:
    return _bits(pynvml.nvmlDeviceGetCpuAffinity(handle, _MASK_WORDS))


def _numa_node(handle: Any, bus_id: Reading[str]) -> Reading[int]:
    """The NUMA node next to the GPU, by the driver or else by the kernel's PCI tree."""
    what = "NUMA node"
    nodes = read(
        what, pynvml.nvmlDeviceGetMemoryAffinity, handle, _MASK_WORDS, pynvml.NVML_AFFINITY_SCOPE_NODE
    )
    if not isinstance(nodes, Missing):
        found = _bits(nodes)
        if found:
            return found[0]
    if isinstance(bus_id, str):
        try:
            # NVML writes the PCI domain with eight digits, the kernel with four
            node = int(Path(f"/sys/bus/pci/devices/{bus_id.lower()[4:]}/numa_node").read_text())
        except (OSError, ValueError):
            node = -1
        if node >= 0:
            return node
    return nodes if isinstance(nodes, Missing) else Missing(Absence.NOT_SUPPORTED, f"{what}: not told")


def _bits(words: Any) -> tuple[int, ...]:
    return tuple(
        64 * place + bit for place, word in enumerate(words) if word for bit in range(64) if word >> bit & 1
    )


def _no_mig(mig_enabled: Reading[bool]) -> Reading[tuple[MigInstance, ...]]:
    return mig_enabled if isinstance(mig_enabled, Missing) else ()


def _mig_instances(handle: Any) -> tuple[MigInstance, ...]:
    instances = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except pynvml.NVMLError_NotFound:
            continue
        memory = read("MIG memory", pynvml.nvmlDeviceGetMemoryInfo, mig)
        instances.append(
            MigInstance(
                uuid=pynvml.nvmlDeviceGetUUID(mig),
                gpu_instance=pynvml.nvmlDeviceGetGpuInstanceId(mig),
                compute_instance=pynvml.nvmlDeviceGetComputeInstanceId(mig),
                memory_total_bytes=memory if isinstance(memory, Missing) else memory.total,
                memory_used_bytes=memory if isinstance(memory, Missing) else memory.used,
            )
        )
    return tuple(instances)


def _quiet(call: Callable[..., R], *args: object) -> R | None:
    """None where the driver has no answer for a detail that nothing rests on."""
    try:
        return call(*args)
    except (pynvml.NVMLError, GpuLostError):
        return None
