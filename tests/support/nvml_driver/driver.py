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
from typing import Any, ClassVar

SOURCE = Path(__file__).with_name("nvml.c")
STATE_VARIABLE = "TIERPLANE_TEST_NVML_STATE"
MAGIC = 0x4E564D4C
MAX_GPUS, MAX_LINKS, MAX_EVENTS = 16, 18, 64
GIB = 1024**3

NO_PERMISSION, NOT_SUPPORTED, DRIVER_NOT_LOADED, UNKNOWN = 4, 3, 9, 999
XID_EVENT, DOUBLE_BIT_ECC_EVENT = 0x8, 0x2

FIELDS = (
    *("identity", "memory", "utilisation", "temperature", "threshold", "power", "clocks", "throttle", "ecc"),
    *("remapped", "retired", "nvlink", "affinity", "mig", "events", "recovery"),
)

_Fields = list[tuple[str, Any]]
_u32, _i32, _u64, _char = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_char


class _Link(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [("active", _u32), ("remote_gpu", _i32)]


class _Event(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("seq", _u64),
        ("type", _u64),
        ("data", _u64),
        ("gpu", _u32),
        ("reserved", _u32),
    ]


class _Gpu(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        *[("uuid", _char * 96), ("name", _char * 96), ("bus_id", _char * 32)],
        *[(name, _u64) for name in ("memory_total", "memory_used", "memory_reserved", "throttle")],
        ("ecc", _u64 * 2),
        *[
            (name, _u32)
            for name in ("utilisation", "temperature", "slowdown", "shutdown", "power_mw", "sm_mhz")
        ],
        ("remapped", _u32 * 4),
        *[(name, _u32) for name in ("retired_pending", "numa_node", "capability_major", "capability_minor")],
        *[
            (name, _u32)
            for name in ("recovery_action", "lost", "hidden", "hang_ms", "link_count", "mig_mode")
        ],
        ("errors", _u32 * len(FIELDS)),
        ("links", _Link * MAX_LINKS),
    ]


class _State(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        *[(name, _u32) for name in ("magic", "size", "init_result", "call_result", "gpu_count", "reserved")],
        *[("event_head", _u64), ("driver_version", _char * 80), ("events", _Event * MAX_EVENTS)],
        ("gpus", _Gpu * MAX_GPUS),
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
        self.write()

    def env(self) -> dict[str, str]:
        """Environment variables for a child process, so that it finds this driver instead of the real one."""
        paths = [str(self._library), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
            STATE_VARIABLE: str(self.state_path),
        }

    def uuid(self, gpu: int) -> str:
        return str(self._state.gpus[gpu].uuid.decode())

    def set(self, gpu: int | None = None, **values: Any) -> None:
        """Sets values of one GPU, or of all: any scalar of the C struct, ``ecc=(corrected, uncorrected)``,
        ``remapped=(corrected, uncorrected, pending, failed)``."""
        chosen = range(self._state.gpu_count) if gpu is None else [gpu]
        for index in chosen:
            target = self._state.gpus[index]
            for name, value in values.items():
                if isinstance(value, (tuple, list)):
                    getattr(target, name)[: len(value)] = value
                else:
                    getattr(
                        target, name
                    )  # a misspelt name fails here instead of being set on the Python object only
                    setattr(target, name, value.encode() if isinstance(value, str) else value)
        self.write()

    def fail(self, gpu: int, field: str, code: int = NOT_SUPPORTED) -> None:
        """Calls about ``field`` return ``code``; 0 repairs it."""
        self._state.gpus[gpu].errors[FIELDS.index(field)] = code
        self.write()

    def lose(self, gpu: int) -> None:
        """Every call about the GPU returns GPU_IS_LOST (15)."""
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

    def driver_fails(self, code: int = DRIVER_NOT_LOADED) -> None:
        """NVML can't be initialised and every call returns ``code``; 0 repairs it."""
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
        gpu.power_mw, gpu.sm_mhz = 120_000, 1200
        gpu.numa_node = device.numa_node
        gpu.capability_major = 9
