"""What an XID (an error number of NVIDIA's driver) says about a GPU.

Based on NVIDIA's XID catalogue (docs.nvidia.com/deploy/xid-errors, its "resolution buckets") and the
application errors that NVIDIA's Kubernetes device plugin leaves out of its health check. A number that is not
listed has the severity WATCH: it is not ignored, but alone it does not take a GPU out of use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType


class XidSeverity(IntEnum):
    """How bad a finding is; a larger value is worse."""

    NOTE = 0
    """Not known to be a fault of the GPU."""
    WATCH = 1
    """May be the first sign of a fault: the GPU is suspect."""
    FATAL = 2
    """The GPU must not be used."""


class Recovery(StrEnum):
    """What has to happen before a cordoned GPU may return to use."""

    CLEAR = "clear"
    """Readings without a finding for the whole hold time."""
    RESET = "reset"
    """As CLEAR, and also a reset of the GPU or a reboot of its node."""
    OPERATOR = "operator"
    """An operator uncordons it."""


@dataclass(frozen=True, slots=True)
class Xid:
    """What one error number means."""

    meaning: str
    severity: XidSeverity
    recovery: Recovery = Recovery.CLEAR


def _application(meaning: str) -> Xid:
    return Xid(meaning, XidSeverity.NOTE)


def _watch(meaning: str) -> Xid:
    return Xid(meaning, XidSeverity.WATCH)


def _fatal(meaning: str) -> Xid:
    return Xid(meaning, XidSeverity.FATAL, Recovery.RESET)


XIDS: Mapping[int, Xid] = MappingProxyType(
    {
        8: _application("GPU stopped processing"),
        13: _application("graphics engine exception"),
        31: _application("GPU memory page fault"),
        32: _application("invalid or corrupted push buffer stream"),
        43: _application("GPU stopped processing for one application"),
        45: _application("preemptive clean-up after an earlier error"),
        46: _fatal("GPU stopped processing"),
        48: _fatal("double-bit ECC error"),
        62: _fatal("internal micro-controller halt"),
        63: _watch("memory row remapped or page retired"),
        64: _fatal("memory row could not be remapped"),
        68: _application("video processor exception"),
        69: _application("graphics engine class error"),
        74: _watch("NVLink error"),
        79: _fatal("GPU has fallen off the bus"),
        92: _watch("high rate of single-bit ECC errors"),
        94: _watch("contained memory error"),
        95: _fatal("uncontained memory error"),
        109: _watch("context switch time-out"),
        110: _fatal("security fault"),
        119: _fatal("GSP firmware does not answer"),
        120: _fatal("GSP firmware error"),
        136: _fatal("NVLink training failed"),
        137: _application("NVLink access without privilege"),
        140: _fatal("unrecovered ECC error"),
        143: _fatal("GPU initialisation failed"),
        154: _watch("the driver asks for another recovery action"),
    }
)


def classify(code: int) -> Xid:
    """What the number means; an unknown one has the severity WATCH."""
    return XIDS.get(code, Xid("not in the table", XidSeverity.WATCH))
