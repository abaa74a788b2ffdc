"""Reads this machine's GPUs through the driver's NVML, using the ``nvidia-ml-py`` binding.

:class:`GpuReader` returns one :class:`GpuSample` per GPU that it has ever seen, even if there is no driver or
no permission, a GPU fell off the bus, the driver lacks a function, or the driver is unloaded and loaded
again. A value that can't be read is a missing reading with its reason. Nothing is decided here.

The list of GPUs and the values that rarely change (limits, remapped memory rows, links, MIG mode) are read
every ``slow_interval_s``, everything else at each read.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import pynvml

from controlplane.core.telemetry.samples import (
    NOT_SAMPLED,
    THROTTLE_REASONS,
    Absence,
    GpuCondition,
    GpuInfo,
    GpuSample,
    Missing,
    Reading,
)
from controlplane.node_agent.nvml.calls import (
    GPU_LOST_CODES,
    LASTING_CODES,
    DriverGoneError,
    GpuLostError,
    missing_for,
    read,
)
from controlplane.node_agent.nvml.info import read_info

T = TypeVar("T")

_LOST: Final = Missing(Absence.GPU_LOST, "the GPU is lost")
_CLOSED: Final = Missing(Absence.NO_DRIVER, "not connected to the driver")


@dataclass(slots=True)
class _Slot:
    """What the reader remembers about one GPU."""

    index: int
    info: GpuInfo
    handle: Any = None
    """None if the driver returned none at the last enumeration."""
    lost: str = ""
    """Why the GPU is lost; empty if it is not."""
    unavailable: dict[str, Missing] = field(default_factory=dict)
    """Readings that this driver can't provide; not requested again before the next enumeration."""


class GpuReader:
    """All GPUs of this machine. Only one thread may use it."""

    def __init__(
        self,
        *,
        slow_interval_s: float = 10.0,
        retry_interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slow_interval_s = slow_interval_s
        self._retry_interval_s = retry_interval_s
        self._clock = clock
        self.connected = False
        """Whether the driver responded to the last read."""
        self._due_s = -math.inf
        """When to enumerate the GPUs next, or to connect if not connected; by ``clock``."""
        self._slots: dict[str, _Slot] = {}
        """By UUID."""
        self._unidentified: dict[int, _Slot] = {}
        """By index: GPUs whose UUID could not be read."""
        self.driver_version: Reading[str] = _CLOSED
        """The driver's version, or why there is no driver."""

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU, in the driver's order; never raises."""
        now_s = self._clock()
        try:
            if not self.connected:
                if now_s < self._due_s:
                    return self._unreadable()
                self._connect()
            if now_s >= self._due_s:
                self._enumerate()
                self._due_s = now_s + self._slow_interval_s
            return tuple(self._sample(slot) for slot in self._ordered())
        except DriverGoneError as gone:
            self._disconnect(gone.missing)
            self._due_s = now_s + self._retry_interval_s
            return self._unreadable()

    def close(self) -> None:
        """Disconnects from the driver."""
        self._disconnect(_CLOSED)

    def _connect(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DriverGoneError(missing_for("NVML", error)) from error
        self.connected = True
        self._due_s = -math.inf
        self.driver_version = read("driver version", pynvml.nvmlSystemGetDriverVersion)

    def _disconnect(self, why: Missing) -> None:
        if self.connected:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
        self.connected = False
        self.driver_version = why
        for slot in self._slots.values():
            slot.handle = None

    def _enumerate(self) -> None:
        count = read("GPU count", pynvml.nvmlDeviceGetCount)
        if isinstance(count, Missing):
            raise DriverGoneError(count)
        found: set[str] = set()
        lost_at: dict[int, str] = {}
        self._unidentified = {}
        for index in range(count):
            try:
                handle = read("GPU handle", pynvml.nvmlDeviceGetHandleByIndex, index)
                uuid = (
                    handle if isinstance(handle, Missing) else read("UUID", pynvml.nvmlDeviceGetUUID, handle)
                )
            except GpuLostError as lost:
                lost_at[index] = str(lost)
                continue
            if isinstance(uuid, Missing):
                self._unidentified[index] = _Slot(index, GpuInfo(uuid="", index=index))
                self._unidentified[index].unavailable["identity"] = uuid
                continue
            found.add(uuid)
            slot = self._slots.setdefault(uuid, _Slot(index, GpuInfo(uuid=uuid, index=index)))
            slot.index, slot.handle, slot.lost = index, handle, ""
            slot.unavailable.clear()
        self._mark_lost(found, lost_at)
        handles = {uuid: slot.handle for uuid, slot in self._slots.items() if slot.handle is not None}
        for uuid, handle in handles.items():
            slot = self._slots[uuid]
            try:
                info = read_info(slot.index, uuid, handle, handles)
            except GpuLostError as lost:
                slot.handle, slot.lost = None, str(lost)
                continue
            if info != slot.info:  # otherwise the samples continue to share one instance
                slot.info = info

    def _mark_lost(self, found: set[str], lost_at: dict[int, str]) -> None:
        """Marks every GPU that was not found as lost. A lost GPU that was never identified has no UUID."""
        for uuid, slot in self._slots.items():
            if uuid in found:
                continue
            slot.handle = None
            slot.lost = lost_at.pop(slot.index, "the driver no longer lists it")
        for index, why in lost_at.items():
            self._unidentified[index] = _Slot(index, GpuInfo(uuid="", index=index), lost=why)

    def _ordered(self) -> list[_Slot]:
        return sorted([*self._slots.values(), *self._unidentified.values()], key=lambda slot: slot.index)

    def _unreadable(self) -> tuple[GpuSample, ...]:
        why = self.driver_version if isinstance(self.driver_version, Missing) else _CLOSED
        return tuple(
            _absent(slot.info, GpuCondition.UNREADABLE, why) for slot in self._ordered() if slot.info.uuid
        )

    def _sample(self, slot: _Slot) -> GpuSample:
        if slot.handle is None:
            if slot.lost:
                return _absent(slot.info, GpuCondition.LOST, Missing(Absence.GPU_LOST, slot.lost))
            why = slot.unavailable.get("identity", NOT_SAMPLED)
            return _absent(slot.info, GpuCondition.UNREADABLE, why)
        try:
            return self._read_values(slot, _Query(slot))
        except GpuLostError as lost:
            slot.handle, slot.lost = None, str(lost)
            return _absent(slot.info, GpuCondition.LOST, _LOST)

    def _read_values(self, slot: _Slot, query: _Query) -> GpuSample:
        memory = query("memory", _memory)
        utilisation = query("utilisation", pynvml.nvmlDeviceGetUtilizationRates)
        power_mw = query("power", pynvml.nvmlDeviceGetPowerUsage)
        sample = GpuSample(
            info=slot.info,
            condition=GpuCondition.OK,
            memory_total_bytes=memory if isinstance(memory, Missing) else memory.total,
            memory_used_bytes=memory if isinstance(memory, Missing) else memory.total - memory.free,
            memory_free_bytes=memory if isinstance(memory, Missing) else memory.free,
            gpu_ratio=utilisation if isinstance(utilisation, Missing) else utilisation.gpu / 100,
            temperature_c=query("temperature", _temperature),
            power_w=power_mw if isinstance(power_mw, Missing) else power_mw / 1000,
            sm_clock_mhz=query("SM clock", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            throttle=query("throttle reasons", _throttle),
            ecc_corrected=query(
                "corrected ECC errors",
                pynvml.nvmlDeviceGetTotalEccErrors,
                pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
                pynvml.NVML_VOLATILE_ECC,
            ),
            ecc_uncorrected=query(
                "uncorrected ECC errors",
                pynvml.nvmlDeviceGetTotalEccErrors,
                pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                pynvml.NVML_VOLATILE_ECC,
            ),
        )
        if query.reset_required is not None:
            why = query.reset_required.reason
            return replace(sample, condition=GpuCondition.RESET_REQUIRED, detail=why)
        return sample


class _Query:
    """Reads values of one GPU from the driver, except those that the driver is known not to provide."""

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self.reset_required: Missing | None = None

    def __call__(self, what: str, call: Callable[..., T], *args: object) -> Reading[T]:
        known = self._slot.unavailable.get(what)
        if known is not None:
            return known
        try:
            return call(self._slot.handle, *args)
        except pynvml.NVMLError as error:
            if error.value in GPU_LOST_CODES:
                raise GpuLostError(str(error)) from error
            missing = missing_for(what, error)
            if missing.absence is Absence.NO_DRIVER:
                raise DriverGoneError(missing) from error
            if error.value in LASTING_CODES:
                self._slot.unavailable[what] = missing
            if error.value == pynvml.NVML_ERROR_RESET_REQUIRED:
                self.reset_required = missing
            return missing


def _absent(info: GpuInfo, condition: GpuCondition, why: Missing) -> GpuSample:
    return GpuSample(
        info=info,
        condition=condition,
        detail=why.reason,
        memory_total_bytes=why,
        memory_used_bytes=why,
        memory_free_bytes=why,
        gpu_ratio=why,
        temperature_c=why,
        power_w=why,
        sm_clock_mhz=why,
        throttle=why,
        ecc_corrected=why,
        ecc_uncorrected=why,
    )


def _memory(handle: Any) -> Any:
    """Tries version 2 first; drivers before 510 have only version 1."""
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError as error:
        if error.value not in LASTING_CODES:
            raise
    return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _temperature(handle: Any) -> int:
    """Tries two functions: CUDA 14 removes the first one, and the second one exists from driver 570 on."""
    try:
        return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError as error:
        if error.value not in LASTING_CODES:
            raise
    return int(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU))


def _throttle(handle: Any) -> tuple[str, ...]:
    try:
        bits = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError as error:
        if error.value not in LASTING_CODES:
            raise
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    if bits == 0:
        return ()
    return tuple(name for bit, name in enumerate(THROTTLE_REASONS) if bits >> bit & 1)
