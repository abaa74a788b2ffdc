"""Calls of NVML, whose return codes become missing readings, or errors if the GPU or the driver is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import pynvml

from controlplane.core.telemetry.samples import Absence, Missing, Reading

T = TypeVar("T")

GPU_LOST_CODES: Final = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_GPU_NOT_FOUND})
DRIVER_GONE_CODES: Final = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
LASTING_CODES: Final = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
    }
)
"""Until the driver changes, every further call returns the same code."""

_ABSENCES: Final = {
    pynvml.NVML_ERROR_NO_PERMISSION: Absence.NO_PERMISSION,
    pynvml.NVML_ERROR_NOT_SUPPORTED: Absence.NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: Absence.NO_FUNCTION,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: Absence.NO_FUNCTION,
    pynvml.NVML_ERROR_DEPRECATED: Absence.NO_FUNCTION,
    **dict.fromkeys(GPU_LOST_CODES, Absence.GPU_LOST),
    **dict.fromkeys(DRIVER_GONE_CODES, Absence.NO_DRIVER),
}
_REMEDIES: Final = {
    pynvml.NVML_ERROR_NO_PERMISSION: "run the agent with access to /dev/nvidia*",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the NVIDIA driver",
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver is installed here",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated: reload it or reboot",
}

_missing: dict[tuple[str, int], Missing] = {}


class GpuLostError(Exception):
    """The driver reports that this GPU is gone."""


class DriverGoneError(Exception):
    """The driver no longer responds; ``missing`` says why."""

    def __init__(self, missing: Missing) -> None:
        super().__init__(missing.reason)
        self.missing = missing


def missing_for(what: str, error: pynvml.NVMLError) -> Missing:
    """The missing reading of ``what`` after ``error``. Equal readings are one object, to save memory."""
    key = (what, int(error.value))
    if key not in _missing:
        text = f"{what}: {error}"
        if key[1] in _REMEDIES:
            text += f" ({_REMEDIES[key[1]]})"
        _missing[key] = Missing(_ABSENCES.get(key[1], Absence.ERROR), text)
    return _missing[key]


def read(what: str, call: Callable[..., T], *args: object) -> Reading[T]:
    """The call's value, or why there is none.

    Raises GpuLostError or DriverGoneError if the failure concerns more than this one value.
    """
    try:
        return call(*args)
    except pynvml.NVMLError as error:
        if error.value in GPU_LOST_CODES:
            raise GpuLostError(str(error)) from error
        if error.value in DRIVER_GONE_CODES:
            raise DriverGoneError(missing_for(what, error)) from error
        return missing_for(what, error)
    except UnicodeDecodeError:
        return Missing(Absence.ERROR, f"{what}: the driver returned text that is not valid UTF-8")
