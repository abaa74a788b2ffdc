"""XID and ECC events. A separate thread blocks in the driver until one occurs; nothing is polled.

The watcher has its own connection to NVML (NVML counts connections), so when the sampling thread disconnects
from the driver and reconnects, the watcher's wait is not affected.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import threading
import time
from typing import Any, Final

import pynvml

from controlplane.core.telemetry.samples import NOT_SAMPLED, Absence, GpuEventKind, Missing, Reading
from controlplane.node_agent.agent import EventHandler
from controlplane.node_agent.nvml.calls import GPU_LOST_CODES, missing_for

_KINDS: Final = {
    pynvml.nvmlEventTypeXidCriticalError: GpuEventKind.XID,
    pynvml.nvmlEventTypeDoubleBitEccError: GpuEventKind.UNCORRECTED_ECC,
}
_ALL_KINDS: Final = functools.reduce(operator.or_, _KINDS)
_REJOIN_PAUSE_S: Final = 0.2
"""Pause before a new event set if the last one failed at once, so that the driver is not called in a loop."""


class EventWatcher:
    """Waits for events of all GPUs until it is stopped. Continues after a GPU is lost or the driver is
    gone."""

    def __init__(self, handler: EventHandler, *, wait_s: float = 1.0, retry_interval_s: float = 5.0) -> None:
        self._handler = handler
        self._wait_ms = int(wait_s * 1000)
        self._retry_interval_s = retry_interval_s
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml-events", daemon=True)
        self.watched: Reading[int] = NOT_SAMPLED
        """How many GPUs report their events, or why none does."""

    def start(self) -> None:
        """Starts waiting."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread; takes up to ``wait_s``."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self._wait_ms / 1000 + 5)

    def refresh(self) -> None:
        """Starts watching further GPUs. Call it when the GPUs or the driver have changed."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self._wake.wait(self._connection())

    def _connection(self) -> float:
        """Runs one connection to the driver until it ends; returns the pause in seconds before the next."""
        began_s = time.monotonic()
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.watched = missing_for("GPU events", error)
            return self._retry_interval_s
        try:
            return self._wait_for_events()
        except pynvml.NVMLError as error:
            self.watched = missing_for("GPU events", error)
            if error.value not in GPU_LOST_CODES:
                return self._retry_interval_s
            # A lost GPU invalidates the event set. Events in between are missed, so make a new one at once.
            return 0.0 if time.monotonic() - began_s > _REJOIN_PAUSE_S else _REJOIN_PAUSE_S
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _wait_for_events(self) -> float:
        events = pynvml.nvmlEventSetCreate()
        uuids: dict[int | None, str] = {}
        try:
            while not self._stopping.is_set():
                if not uuids or self._wake.is_set():
                    self._wake.clear()
                    refused = _register_new(events, uuids)
                    self.watched = len(uuids) if uuids else refused
                    if not uuids:
                        return self._retry_interval_s
                try:
                    event = pynvml.nvmlEventSetWait_v2(events, self._wait_ms)
                except pynvml.NVMLError_Timeout:
                    continue
                self._report(event, uuids)
            return 0.0
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(events)

    def _report(self, event: Any, uuids: dict[int | None, str]) -> None:
        kind = _KINDS.get(event.eventType)
        if kind is not None:
            code = int(event.eventData) if kind is GpuEventKind.XID else 0
            self._handler(time.time(), kind, uuids.get(_address(event.device), ""), code)


def _register_new(events: Any, uuids: dict[int | None, str]) -> Missing:
    """Registers the GPUs that are not in ``uuids`` (by handle) yet; returns why others report no events."""
    refused = Missing(Absence.NOT_SUPPORTED, "GPU events: there is no GPU")
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            if _address(handle) in uuids:
                continue
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            supported = _ALL_KINDS & pynvml.nvmlDeviceGetSupportedEventTypes(handle)
            pynvml.nvmlDeviceRegisterEvents(handle, supported, events)
        except pynvml.NVMLError as error:
            refused = missing_for("GPU events", error)
            continue
        uuids[_address(handle)] = uuid
    return refused


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
