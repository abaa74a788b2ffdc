"""The values of a GPU that rarely change: limits, remapped memory rows, NVLinks, NUMA node, MIG mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import pynvml

from controlplane.core.telemetry.samples import (
    Absence,
    GpuInfo,
    Missing,
    NvLink,
    Reading,
    RecoveryAction,
    RowRemaps,
)
from controlplane.node_agent.nvml.calls import missing_for, read

T = TypeVar("T")
R = TypeVar("R")

_MASK_WORDS: Final = 16
"""64-bit words in a memory affinity mask: 1,024 NUMA nodes."""

_RECOVERY: Final[tuple[RecoveryAction, ...]] = tuple(RecoveryAction)
_SWITCH_TYPE: Final = pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH


def read_info(index: int, uuid: str, handle: Any, handles: Mapping[str, Any]) -> GpuInfo:
    """Reads the values of one GPU that rarely change. ``handles`` are those of all GPUs that respond, by
    UUID.

    Raises GpuLostError or DriverGoneError.
    """

    def query(what: str, call: Callable[..., T], *args: object) -> Reading[T]:
        return read(what, call, handle, *args)

    shutdown_c, slowdown_c = (
        query("temperature threshold", pynvml.nvmlDeviceGetTemperatureThreshold, kind)
        for kind in (pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
    )
    return GpuInfo(
        uuid=uuid,
        index=index,
        name=query("name", pynvml.nvmlDeviceGetName),
        compute_capability=query("compute capability", pynvml.nvmlDeviceGetCudaComputeCapability),
        slowdown_c=slowdown_c,
        shutdown_c=shutdown_c,
        row_remaps=query("remapped rows", _row_remaps),
        page_retirement_pending=query(
            "retired pages", lambda device: bool(pynvml.nvmlDeviceGetRetiredPagesPendingStatus(device))
        ),
        recovery_action=_recovery_action(handle),
        nvlinks=query("NVLinks", _nvlinks, handles),
        numa_node=_numa_node(handle, query("PCI address", _bus_id)),
        mig_enabled=query("MIG mode", lambda device: bool(pynvml.nvmlDeviceGetMigMode(device)[0])),
    )


def _bus_id(handle: Any) -> str:
    return _text(pynvml.nvmlDeviceGetPciInfo(handle).busId)


def _text(value: str | bytes) -> str:
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else value).upper()


def _row_remaps(handle: Any) -> RowRemaps:
    corrected, uncorrected, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return RowRemaps(corrected, uncorrected, bool(pending), bool(failed))


def _recovery_action(handle: Any) -> Reading[RecoveryAction]:
    what = "recovery action"
    values = read(what, pynvml.nvmlDeviceGetFieldValues, handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if isinstance(values, Missing):
        return values
    if values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return missing_for(what, pynvml.NVMLError(values[0].nvmlReturn))
    action = int(values[0].value.uiVal)
    if action >= len(_RECOVERY):
        return Missing(Absence.ERROR, f"{what}: the driver returned {action}, which is not a known action")
    return _RECOVERY[action]


def _nvlinks(handle: Any, handles: Mapping[str, Any]) -> tuple[NvLink, ...]:
    """Every NVLink of the GPU; the driver rejects numbers past the last one as invalid."""
    by_bus_id = {}
    for uuid, other in handles.items():
        bus_id = _or_none(_bus_id, other)
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
            _or_none(lambda at=link: _text(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, at).busId)) or ""
        )
        kind = _or_none(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        links.append(NvLink(active, by_bus_id.get(remote, ""), to_switch=kind == _SWITCH_TYPE))
    return tuple(links)


def _numa_node(handle: Any, bus_id: Reading[str]) -> Reading[int]:
    """The NUMA node next to the GPU, from the driver or else from the kernel's PCI tree."""
    what = "NUMA node"
    nodes = read(
        what, pynvml.nvmlDeviceGetMemoryAffinity, handle, _MASK_WORDS, pynvml.NVML_AFFINITY_SCOPE_NODE
    )
    if not isinstance(nodes, Missing):
        node = _lowest_bit(nodes)
        if node is not None:
            return node
    if isinstance(bus_id, str):
        try:
            # NVML writes the PCI domain with eight digits, the kernel with four.
            node = int(Path(f"/sys/bus/pci/devices/{bus_id.lower()[4:]}/numa_node").read_text())
        except (OSError, ValueError):
            node = -1
        if node >= 0:
            return node
    return nodes if isinstance(nodes, Missing) else Missing(Absence.NOT_SUPPORTED, f"{what}: not reported")


def _lowest_bit(words: Any) -> int | None:
    """The number of the lowest bit that is set in a mask of 64-bit words."""
    for number, word in enumerate(words):
        if word:
            return 64 * number + (int(word) & -int(word)).bit_length() - 1
    return None


def _or_none(call: Callable[..., R], *args: object) -> R | None:
    """The call's value; None if the call fails. For details that may be left out."""
    try:
        return call(*args)
    except pynvml.NVMLError:
        return None
