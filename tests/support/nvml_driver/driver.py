"""Builds the scripted NVML and scripts it.

::

    driver = FakeDriver(tmp_path, devices=8)
    subprocess.run([...], env={**os.environ, **driver.env()})   # the real nvidia-ml-py finds it
    driver.set(gpu=3, temperature=95)
    driver.xid(3, 79)
    driver.lose(3)

Every call replaces the state file atomically; a running process sees it at its next NVML call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("nvml.c")
STATE_VARIABLE = "TIERPLANE_TEST_NVML_STATE"
MAGIC = 0x4E564D4C
MAX_GPUS, MAX_LINKS, MAX_PROCESSES, MAX_MIG, MAX_EVENTS = 16, 18, 32, 8, 64
GIB = 1024**3

NO_PERMISSION, NOT_SUPPORTED, DRIVER_NOT_LOADED, UNKNOWN = 4, 3, 9, 999
XID_EVENT, DOUBLE_BIT_ECC_EVENT = 0x8, 0x2
TOPOLOGY = {"internal": 0, "single": 10, "multiple": 20, "hostbridge": 30, "node": 40, "system": 50}

FIELDS = (
    *("identity", "memory", "utilisation", "temperature", "threshold", "power", "power_limit", "clocks"),
    *("throttle", "ecc", "remapped", "retired", "nvlink", "topology", "affinity", "mig", "processes"),
    *("events", "recovery"),
)

_u32, _i32, _u64, _char = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_char


class _Process(ctypes.Structure):
    _fields_ = [("pid", _u32), ("reserved", _u32), ("bytes", _u64)]


class _Mig(ctypes.Structure):
    _fields_ = [
        *[("uuid", _char * 96), ("total", _u64), ("used", _u64)],
        *[("gpu_instance", _u32), ("compute_instance", _u32)],
    ]


class _Link(ctypes.Structure):
    _fields_ = [("active", _u32), ("remote_gpu", _i32)]


class _Event(ctypes.Structure):
    _fields_ = [("seq", _u64), ("type", _u64), ("data", _u64), ("gpu", _u32), ("reserved", _u32)]


class _Gpu(ctypes.Structure):
    _fields_ = [
        *[("uuid", _char * 96), ("name", _char * 96), ("bus_id", _char * 32)],
        *[(name, _u64) for name in ("memory_total", "memory_used", "memory_reserved", "throttle")],
        *[("ecc", _u64 * 2 * 2), ("cpu_mask", _u64 * 4)],
        *[(name, _u32) for name in ("utilisation", "memory_utilisation", "temperature", "slowdown")],
        *[(name, _u32) for name in ("shutdown", "power_mw", "power_limit_mw", "sm_mhz", "memory_mhz")],
        *[(name, _u32) for name in ("max_sm_mhz", "max_memory_mhz")],
        ("remapped", _u32 * 4),
        *[(name, _u32) for name in ("retired_corrected", "retired_uncorrected", "retired_pending")],
        *[(name, _u32) for name in ("numa_node", "capability_major", "capability_minor")],
        *[(name, _u32) for name in ("recovery_action", "lost", "hidden", "hang_ms")],
        *[(name, _u32) for name in ("link_count", "process_count", "mig_mode", "mig_count")],
        ("errors", _u32 * len(FIELDS)),
        ("links", _Link * MAX_LINKS),
        ("processes", _Process * MAX_PROCESSES),
        ("migs", _Mig * MAX_MIG),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        *[(name, _u32) for name in ("magic", "size", "init_result", "call_result", "gpu_count", "reserved")],
        *[("event_head", _u64), ("driver_version", _char * 80), ("events", _Event * MAX_EVENTS)],
        *[("topology", _u32 * MAX_GPUS * MAX_GPUS), ("gpus", _Gpu * MAX_GPUS)],
    ]


@dataclass(frozen=True)
class Device:
    """A GPU as it is at the start; :meth:`FakeDriver.set` changes any of it later."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory_total: int = 80 * GIB
    temperature: int = 45
    numa_node: int = 0


def build_library(without: Sequence[str] = ()) -> Path:
    """The folder with the built libnvidia-ml.so.1, ``without`` some symbols; built once per variant."""
    source = SOURCE.read_bytes()
    variant = hashlib.sha256(source + "\0".join(sorted(without)).encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"tierplane-test-nvml-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    folder = root / variant
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        fresh = folder / f"build-{os.getpid()}.so"
        hidden = [f"-D{symbol}=absent_{symbol}" for symbol in without]
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
        subprocess.run(["cc", *flags, *hidden, "-o", fresh, SOURCE, "-lpthread"], check=True)
        fresh.replace(library)
    return folder


class FakeDriver:
    """One scripted driver: a built library and its state file under ``folder``."""

    def __init__(
        self, folder: Path, devices: int | Iterable[Device] = 8, *, without: Sequence[str] = ()
    ) -> None:
        self.state_path = folder / "nvml-state"
        self._library = build_library(without)
        self._state = _State(magic=MAGIC, size=ctypes.sizeof(_State), driver_version=b"580.95.05")
        described = [Device()] * devices if isinstance(devices, int) else list(devices)
        self._state.gpu_count = len(described)
        for index, device in enumerate(described):
            self._describe(index, device)
        for one in range(MAX_GPUS):
            for other in range(MAX_GPUS):
                same_node = self._state.gpus[one].numa_node == self._state.gpus[other].numa_node
                self._state.topology[one][other] = TOPOLOGY["node" if same_node else "system"]
        self.write()

    def env(self) -> dict[str, str]:
        """What a child process needs to find this driver in the place of the real one."""
        paths = [str(self._library), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
            STATE_VARIABLE: str(self.state_path),
        }

    def uuid(self, gpu: int) -> str:
        return str(self._state.gpus[gpu].uuid.decode())

    def bus_id(self, gpu: int) -> str:
        return str(self._state.gpus[gpu].bus_id.decode())

    def set(self, gpu: int | None = None, **values: Any) -> None:
        """Sets figures of one GPU, or of all: any scalar of the C struct, ``ecc=((corrected volatile,
        corrected aggregate), (uncorrected volatile, uncorrected aggregate))``, ``remapped=(corrected,
        uncorrected, pending, failed)``."""
        chosen = range(self._state.gpu_count) if gpu is None else [gpu]
        for index in chosen:
            target = self._state.gpus[index]
            for name, value in values.items():
                if name == "ecc":
                    for kind in (0, 1):
                        target.ecc[kind][:] = value[kind]
                elif isinstance(value, (tuple, list)):
                    getattr(target, name)[: len(value)] = value
                else:
                    getattr(target, name)  # a misspelt name fails instead of being set on the mirror only
                    setattr(target, name, value.encode() if isinstance(value, str) else value)
        self.write()

    def fail(self, gpu: int, field: str, code: int = NOT_SUPPORTED) -> None:
        """Calls about ``field`` answer ``code``; 0 mends it."""
        self._state.gpus[gpu].errors[FIELDS.index(field)] = code
        self.write()

    def lose(self, gpu: int) -> None:
        """Every call about the GPU answers GPU_IS_LOST (15)."""
        self.set(gpu, lost=1)

    def find(self, gpu: int) -> None:
        """The lost or hidden GPU is back."""
        self.set(gpu, lost=0, hidden=0)

    def hide(self, gpu: int) -> None:
        """The driver enumerates one GPU less, as after a restart without it."""
        self.set(gpu, hidden=1)

    def xid(self, gpu: int, code: int) -> None:
        """An XID event on a GPU."""
        self.event(gpu, XID_EVENT, code)

    def event(self, gpu: int, kind: int, data: int = 0) -> None:
        seq = self._state.event_head
        self._state.events[seq % MAX_EVENTS] = _Event(seq, kind, data, gpu, 0)
        self._state.event_head = seq + 1
        self.write()

    def links(self, gpu: int, remotes: Sequence[int | None], inactive: Sequence[int] = ()) -> None:
        """NVLinks in order: the GPU at the other end, None for a switch; ``inactive`` are link numbers."""
        target = self._state.gpus[gpu]
        target.link_count = len(remotes)
        for link, remote in enumerate(remotes):
            target.links[link] = _Link(int(link not in inactive), -1 if remote is None else remote)
        self.write()

    def topology(self, one: int, other: int, level: str) -> None:
        """The common ancestor of two GPUs, a key of TOPOLOGY."""
        self._state.topology[one][other] = self._state.topology[other][one] = TOPOLOGY[level]
        self.write()

    def processes(self, gpu: int, running: Sequence[tuple[int, int]]) -> None:
        """(pid, bytes) of the processes on a GPU."""
        target = self._state.gpus[gpu]
        target.process_count = len(running)
        for place, (pid, size) in enumerate(running):
            target.processes[place] = _Process(pid, 0, size)
        self.write()

    def mig(self, gpu: int, instances: Sequence[tuple[int, int]]) -> None:
        """MIG mode on, with instances of (total, used) bytes."""
        target = self._state.gpus[gpu]
        target.mig_mode, target.mig_count = 1, len(instances)
        for place, (total, used) in enumerate(instances):
            target.migs[place] = _Mig(f"MIG-{gpu:04x}-{place:04x}".encode(), total, used, place + 1, 0)
        self.write()

    def driver_fails(self, code: int = DRIVER_NOT_LOADED) -> None:
        """NVML can't be initialised and every call answers ``code``; 0 mends it."""
        self._state.init_result = self._state.call_result = code
        self.write()

    def driver_gone(self) -> None:
        """The driver is unloaded; :meth:`write` loads it again."""
        self.state_path.unlink()

    def write(self) -> None:
        fresh = self.state_path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(bytes(self._state))
        fresh.replace(self.state_path)

    def _describe(self, index: int, device: Device) -> None:
        gpu = self._state.gpus[index]
        digest = hashlib.sha256(f"{self.state_path}:{index}".encode()).hexdigest()
        parts = (digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32])
        gpu.uuid = ("GPU-" + "-".join(parts)).encode()
        gpu.name = device.name.encode()
        gpu.bus_id = f"00000000:{0x10 + index:02X}:00.0".encode()
        gpu.memory_total, gpu.memory_reserved, gpu.memory_used = device.memory_total, GIB // 2, GIB
        gpu.temperature, gpu.slowdown, gpu.shutdown = device.temperature, 87, 92
        gpu.power_mw, gpu.power_limit_mw = 120_000, 700_000
        gpu.sm_mhz, gpu.max_sm_mhz, gpu.memory_mhz, gpu.max_memory_mhz = 1200, 1980, 2619, 2619
        gpu.numa_node = device.numa_node
        gpu.cpu_mask[0] = 0xFF << (8 * device.numa_node)
        gpu.capability_major = 9
