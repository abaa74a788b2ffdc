"""What runs on every node: samples its GPUs, CPUs, memory and disk, and keeps a bounded record.

The agent measures and remembers; it judges nothing. A reader pulls: :meth:`NodeAgent.latest`,
:meth:`NodeAgent.since`, :meth:`NodeAgent.events`, and who asks all the time :meth:`NodeAgent.news`. None of
them ever waits for the driver: if the driver hangs, the last sample simply grows old, which is what its
reader has to see.

It knows nothing of Ray or the driver: :func:`controlplane.node_agent.local.local_agent` gives it this
machine's GPUs, :mod:`controlplane.node_agent.ray_actor` makes it an actor.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import psutil

from controlplane.core.telemetry.node_updates import NO_INFOS, GpuInfoCache, NodeUpdate, node_update
from controlplane.core.telemetry.samples import (
    Absence,
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    GpuSample,
    Missing,
    NodeSample,
    Reading,
)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Numbered(Protocol):
    @property
    def seq(self) -> int: ...


N = TypeVar("N", bound=_Numbered)

EventHandler = Callable[[float, GpuEventKind, str, int], None]
"""Called from any thread with wall-clock time, kind, GPU UUID and XID number."""


class GpuSource(Protocol):
    """Where samples of GPUs come from; one thread at a time asks."""

    @property
    def connected(self) -> bool:
        """Whether the driver answered last."""
        ...

    @property
    def driver_version(self) -> Reading[str]:
        """The driver's version, or why there is no driver."""
        ...

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU; never raises."""
        ...

    def close(self) -> None:
        """Lets the driver go."""
        ...


class EventSource(Protocol):
    """Where events of GPUs come from."""

    @property
    def watched(self) -> Reading[int]:
        """How many GPUs report events, or why none does."""
        ...

    def start(self) -> None:
        """Begins to call the handler."""
        ...

    def stop(self) -> None:
        """Ends it."""
        ...

    def look_again(self) -> None:
        """The GPUs or the driver changed."""
        ...


class NodeAgent:
    """Samples this machine every ``interval_s`` in a thread of its own, between start and stop."""

    def __init__(
        self,
        node_id: str,
        gpus: GpuSource,
        watch: Callable[[EventHandler], EventSource],
        *,
        interval_s: float = 1.0,
        keep_samples: int = 1000,
        keep_events: int = 1000,
        disk_path: str = "/",
    ) -> None:
        self.node_id = node_id
        self.epoch = uuid.uuid4().hex
        self._interval_s = interval_s
        self._disk_path = disk_path
        self._boot_id = _boot_id()
        self._samples: deque[NodeSample] = deque(maxlen=keep_samples)
        self._events: deque[GpuEvent] = deque(maxlen=keep_events)
        self._infos = GpuInfoCache(self.epoch, 1, ())
        """Of the newest sample."""
        self._lock = threading.Lock()
        self._sampled = 0
        self._reported = 0
        self._gpus = gpus
        self._watcher = watch(self._on_event)
        self._conditions: dict[str, GpuCondition] = {}
        self._had_driver: bool | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-agent", daemon=True)

    def start(self) -> None:
        """Begins to sample and to wait for events."""
        self._watcher.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends sampling and lets the driver go; the record stays readable."""
        self._stopping.set()
        self._watcher.stop()
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
            return self._samples[-1] if self._samples else None

    def since(self, seq: int = 0, epoch: str | None = None) -> list[NodeSample]:
        """Samples after number ``seq`` of ``epoch``; of another epoch than this agent's: all there are."""
        with self._lock:
            return _after(self._samples, seq if epoch in (None, self.epoch) else 0)

    def events(self, since_seq: int = 0, epoch: str | None = None) -> list[GpuEvent]:
        """Events after number ``since_seq`` of ``epoch``, oldest first; as :meth:`since`."""
        with self._lock:
            return _after(self._events, since_seq if epoch in (None, self.epoch) else 0)

    def news(self, epoch: str, event_seq: int, infos: tuple[str, int] = NO_INFOS) -> NodeUpdate:
        """The newest sample, and events after number ``event_seq`` of ``epoch``. What rarely changes of the
        GPUs comes along if the reader has it not, or older (``infos``: see :class:`GpuInfoCache.key`)."""
        with self._lock:
            sample, known = (self._samples[-1] if self._samples else None), self._infos
        return node_update(sample, known, self.events(event_seq, epoch), infos)

    def sample(self) -> NodeSample:
        """Takes a sample now and records it. The agent's thread does this; call it only without one."""
        started_s = time.perf_counter()
        gpus = self._gpus.read()
        driver = self._gpus.driver_version
        self._notice_driver(driver)
        self._notice_conditions(gpus)
        memory, disk = _memory(), _disk(self._disk_path)
        self._sampled += 1
        sample = NodeSample(
            node_id=self.node_id,
            epoch=self.epoch,
            seq=self._sampled,
            unix_s=time.time(),
            boot_id=self._boot_id,
            cpu_count=os.cpu_count() or 1,
            cpu_ratio=self._cpu_ratio(),
            load_1m=os.getloadavg()[0],
            memory_total_bytes=memory[0],
            memory_available_bytes=memory[1],
            disk_total_bytes=disk[0],
            disk_free_bytes=disk[1],
            driver_version=driver,
            xid_watched_gpus=self._watcher.watched,
            gpus=gpus,
            cost_s=time.perf_counter() - started_s,
        )
        told = tuple(gpu.info for gpu in gpus)
        with self._lock:
            if told != self._infos.gpus:
                self._infos = GpuInfoCache(self.epoch, self._infos.number + 1, told)
            self._samples.append(sample)
        return sample

    def _run(self) -> None:
        next_s = time.monotonic()
        while not self._stopping.is_set():
            self.sample()
            # a sample that took too long is followed by the next one in its turn, not by a burst
            next_s = max(next_s + self._interval_s, time.monotonic())
            self._stopping.wait(next_s - time.monotonic())

    def _cpu_ratio(self) -> Reading[float]:
        percent = psutil.cpu_percent(interval=None)  # since the call before; the first says nothing
        if self._sampled == 1:
            return Missing(Absence.NOT_SAMPLED, "CPU use needs two samples")
        return percent / 100

    def _notice_driver(self, driver: Reading[str]) -> None:
        has_driver = self._gpus.connected
        if self._had_driver is not None and has_driver is not self._had_driver:
            kind = GpuEventKind.DRIVER_BACK if has_driver else GpuEventKind.DRIVER_GONE
            self._record(time.time(), kind, detail=driver.reason if isinstance(driver, Missing) else driver)
            self._watcher.look_again()
        self._had_driver = has_driver

    def _notice_conditions(self, gpus: Iterable[GpuSample]) -> None:
        for gpu in gpus:
            key = gpu.info.uuid or f"index {gpu.info.index}"
            before = self._conditions.get(key)
            if gpu.condition is GpuCondition.UNREADABLE:
                continue  # the driver is silent: nothing is known to have happened to the GPU
            self._conditions[key] = gpu.condition
            if gpu.condition is GpuCondition.LOST and before is not GpuCondition.LOST:
                self._record(time.time(), GpuEventKind.LOST, gpu.info.uuid, detail=gpu.detail)
            elif gpu.condition is GpuCondition.OK and before is not GpuCondition.OK:
                if before is not None:
                    self._record(time.time(), GpuEventKind.FOUND, gpu.info.uuid)
                if before is not None or self._sampled:
                    self._watcher.look_again()

    def _on_event(self, unix_s: float, kind: GpuEventKind, gpu_uuid: str, code: int) -> None:
        self._record(unix_s, kind, gpu_uuid, code)

    def _record(
        self, unix_s: float, kind: GpuEventKind, gpu_uuid: str = "", code: int = 0, detail: str = ""
    ) -> None:
        with self._lock:
            self._reported += 1
            event = GpuEvent(self.node_id, self.epoch, self._reported, unix_s, kind, gpu_uuid, code, detail)
            self._events.append(event)


def _after(record: deque[N], seq: int) -> list[N]:
    newer: list[N] = []
    for item in reversed(record):
        if item.seq <= seq:
            break
        newer.append(item)
    newer.reverse()
    return newer


def _memory() -> tuple[Reading[int], Reading[int]]:
    try:
        memory = psutil.virtual_memory()
    except (OSError, psutil.Error) as error:
        missing = Missing(Absence.ERROR, f"memory: {error}")
        return missing, missing
    return memory.total, memory.available


def _disk(path: str) -> tuple[Reading[int], Reading[int]]:
    try:
        disk = psutil.disk_usage(path)
    except OSError as error:
        missing = Missing(Absence.ERROR, f"disk: {error}")
        return missing, missing
    return disk.total, disk.free


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return str(int(psutil.boot_time()))
