"""Runs on every node: samples its GPUs, CPUs, memory and disk, and records GPU events.

The agent only measures; the controller decides. Readers poll: :meth:`NodeAgent.latest` for one sample, or
:meth:`NodeAgent.update` repeatedly. Neither ever waits for the driver. If the driver hangs, the newest sample
ages, so the reader notices.

The agent depends neither on Ray nor on the driver: :func:`controlplane.node_agent.local.local_agent` connects
it to this machine's GPUs, :mod:`controlplane.node_agent.ray_actor` makes it a Ray actor.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import psutil

from controlplane.core.telemetry.node_updates import GpuInfoCache, NodeUpdate, node_update
from controlplane.core.telemetry.samples import (
    Absence,
    DiskSample,
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    GpuSample,
    Missing,
    NodeSample,
    Reading,
)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


EventHandler = Callable[[float, GpuEventKind, str, int], None]
"""Called from any thread with wall-clock time in seconds, kind, GPU UUID and XID number (0 if not an XID)."""


class GpuSource(Protocol):
    """Reads this machine's GPUs. Only one thread uses it."""

    @property
    def connected(self) -> bool:
        """Whether the driver responded to the last read."""
        ...

    @property
    def driver_version(self) -> Reading[str]:
        """The driver's version, or why there is no driver."""
        ...

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU. Never raises."""
        ...

    def close(self) -> None:
        """Disconnects from the driver."""
        ...


class EventSource(Protocol):
    """Watches this machine's GPUs for events and passes them to an :data:`EventHandler`."""

    @property
    def watched(self) -> Reading[int]:
        """How many GPUs report events, or why none does."""
        ...

    def start(self) -> None:
        """Starts calling the handler."""
        ...

    def stop(self) -> None:
        """Stops calling the handler."""
        ...

    def refresh(self) -> None:
        """Starts watching further GPUs. Call it when the GPUs or the driver have changed."""
        ...


class NodeAgent:
    """Samples this machine every ``interval_s`` in its own thread, between start and stop.

    The newest sample and the last ``max_events`` events are stored.
    """

    def __init__(
        self,
        node_id: str,
        gpus: GpuSource,
        watch: Callable[[EventHandler], EventSource],
        *,
        interval_s: float = 1.0,
        max_events: int = 1000,
        disk_paths: Sequence[str] = ("/",),
    ) -> None:
        self.node_id = node_id
        self.epoch = uuid.uuid4().hex
        self._interval_s = interval_s
        self._disk_paths = tuple(disk_paths)
        self._boot_id = _boot_id()
        self._latest: NodeSample | None = None
        self._events: deque[GpuEvent] = deque(maxlen=max_events)
        self._infos = GpuInfoCache(self.epoch, 1, ())
        """The infos of the newest sample's GPUs."""
        self._lock = threading.Lock()
        self._sample_count = 0
        self._event_count = 0
        self._gpus = gpus
        self._event_source = watch(self._record)
        self._conditions: dict[str, GpuCondition] = {}
        self._had_driver: bool | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-agent", daemon=True)

    def start(self) -> None:
        """Starts sampling and watching for events."""
        self._event_source.start()
        self._thread.start()

    def stop(self) -> None:
        """Stops sampling and disconnects from the driver. The newest sample and the events stay readable."""
        self._stopping.set()
        self._event_source.stop()
        if self._thread.is_alive():
            self._thread.join(self._interval_s + 5)
        if not self._thread.is_alive():
            self._gpus.close()

    def __enter__(self) -> NodeAgent:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def latest(self) -> NodeSample | None:
        """The newest sample; None before the first."""
        with self._lock:
            return self._latest

    def events(self, since_seq: int = 0, epoch: str | None = None) -> list[GpuEvent]:
        """Events after number ``since_seq`` of ``epoch``, oldest first; all of them if this agent has another
        epoch."""
        if epoch not in (None, self.epoch):
            since_seq = 0
        with self._lock:
            return [event for event in self._events if event.seq > since_seq]

    def update(self, epoch: str, event_seq: int, cached: tuple[str, int]) -> NodeUpdate:
        """The newest sample, and the events after number ``event_seq`` of ``epoch``.

        The infos of the GPUs are included unless the reader has them already: ``cached`` is the
        :attr:`GpuInfoCache.key` of those it has, or ``NOTHING_CACHED``.
        """
        with self._lock:
            sample, infos = self._latest, self._infos
        return node_update(sample, infos, self.events(event_seq, epoch), cached)

    def sample(self) -> NodeSample:
        """Takes a sample now and stores it. Don't call it while the agent's thread runs, which does this
        itself."""
        started_s = time.perf_counter()
        gpus = self._gpus.read()
        driver = self._gpus.driver_version
        self._check_driver(driver)
        self._check_conditions(gpus)
        memory = _memory()
        disks, disk_problem = _disks(self._disk_paths)
        self._sample_count += 1
        sample = NodeSample(
            node_id=self.node_id,
            epoch=self.epoch,
            seq=self._sample_count,
            unix_s=time.time(),
            boot_id=self._boot_id,
            cpu_count=os.cpu_count() or 1,
            cpu_ratio=self._cpu_ratio(),
            memory_total_bytes=memory[0],
            memory_available_bytes=memory[1],
            disk_free_bytes=disks[0].free_bytes if disks else disk_problem,
            driver_version=driver,
            xid_watched_gpus=self._event_source.watched,
            gpus=gpus,
            cost_s=time.perf_counter() - started_s,
            load_1m=_load_1m(),
            disks=disks,
            hostname=socket.gethostname(),
        )
        infos = tuple(gpu.info for gpu in gpus)
        with self._lock:
            if infos != self._infos.gpus:
                self._infos = GpuInfoCache(self.epoch, self._infos.number + 1, infos)
            self._latest = sample
        return sample

    def _run(self) -> None:
        next_s = time.monotonic()
        while not self._stopping.is_set():
            self.sample()
            # After a sample that took too long, the next one is due at once; missed ones are not made up for.
            next_s = max(next_s + self._interval_s, time.monotonic())
            self._stopping.wait(next_s - time.monotonic())

    def _cpu_ratio(self) -> Reading[float]:
        percent = psutil.cpu_percent(interval=None)  # since the previous call; the first value is meaningless
        if self._sample_count == 1:
            return Missing(Absence.NOT_SAMPLED, "CPU utilisation needs two samples")
        return percent / 100

    def _check_driver(self, driver: Reading[str]) -> None:
        has_driver = self._gpus.connected
        if self._had_driver is not None and has_driver is not self._had_driver:
            kind = GpuEventKind.DRIVER_BACK if has_driver else GpuEventKind.DRIVER_GONE
            self._record(time.time(), kind, detail=driver.reason if isinstance(driver, Missing) else driver)
            self._event_source.refresh()
        self._had_driver = has_driver

    def _check_conditions(self, gpus: Iterable[GpuSample]) -> None:
        for gpu in gpus:
            key = gpu.info.uuid or f"index {gpu.info.index}"
            before = self._conditions.get(key)
            if gpu.condition is GpuCondition.UNREADABLE:
                continue  # The driver does not respond; nothing is known to have happened to the GPU.
            self._conditions[key] = gpu.condition
            if gpu.condition is GpuCondition.LOST and before is not GpuCondition.LOST:
                self._record(time.time(), GpuEventKind.LOST, gpu.info.uuid, detail=gpu.detail)
            elif gpu.condition is GpuCondition.OK and before is not GpuCondition.OK and self._sample_count:
                self._event_source.refresh()

    def _record(
        self, unix_s: float, kind: GpuEventKind, gpu_uuid: str = "", code: int = 0, detail: str = ""
    ) -> None:
        with self._lock:
            self._event_count += 1
            event = GpuEvent(
                node_id=self.node_id,
                epoch=self.epoch,
                seq=self._event_count,
                unix_s=unix_s,
                kind=kind,
                gpu_uuid=gpu_uuid,
                code=code,
                detail=detail,
            )
            self._events.append(event)


def _memory() -> tuple[Reading[int], Reading[int]]:
    try:
        memory = psutil.virtual_memory()
    except (OSError, psutil.Error) as error:
        missing = Missing(Absence.ERROR, f"memory: {error}")
        return missing, missing
    return memory.total, memory.available


def _disks(paths: Iterable[str]) -> tuple[tuple[DiskSample, ...], Missing]:
    """The file systems of the folders that exist, each once; and why there is none, if there is none."""
    found: dict[int, DiskSample] = {}
    problem = Missing(Absence.ERROR, "disk: no folder is given")
    for path in paths:
        try:
            device = os.stat(path).st_dev
            if device not in found:
                usage = psutil.disk_usage(path)
                found[device] = DiskSample(path, usage.total, usage.free)
        except OSError as error:
            problem = Missing(Absence.ERROR, f"disk: {error}")
    return tuple(found.values()), problem


def _load_1m() -> Reading[float]:
    try:
        return os.getloadavg()[0]
    except OSError as error:
        return Missing(Absence.ERROR, f"load: {error}")


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return str(int(psutil.boot_time()))
