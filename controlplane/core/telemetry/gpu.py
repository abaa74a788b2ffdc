"""Current signals of the GPUs of one node, from its agent's samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from controlplane.core.telemetry.samples import Absence, GpuSample, Missing, Reading
from controlplane.core.telemetry.series import DEFAULT_LIMITS, FreshnessLimits, Signal, signal_of


@dataclass(frozen=True, slots=True)
class GpuSignals:
    """One GPU now. ``gpu_ratio`` is an exponential moving average, the others are the newest value."""

    gpu_ratio: Signal
    memory_used_ratio: Signal
    temperature_c: Signal
    power_w: Signal


class GpuTelemetry:
    """The newest sample of each GPU of one node, its average utilisation, and the last value of each reading
    that the newest sample lacks.

    A cluster has thousands of GPUs, so there are no windows and no object per GPU: everything is stored by
    the GPU's position in the sample.
    """

    __slots__ = (
        *("_as_sent", "_at_s", "_averages", "_last_values", "_limits", "_positions", "_ratio_seen_s"),
        *("_samples", "uuids"),
    )

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self.uuids: tuple[str, ...] = ()
        """The GPUs in the newest sample, in its order."""
        self._as_sent: tuple[str, ...] | None = None
        """The newest sample's UUIDs if each occurred once and none was empty, else None. The next sample
        usually lists the same UUIDs, and then nothing has to be rearranged."""
        self._positions: dict[str, int] = {}
        """UUID → position: the index into all collections below."""
        self._at_s = -math.inf
        self._samples: tuple[GpuSample | None, ...] = ()
        self._averages: list[float] = []
        self._ratio_seen_s: dict[int, float] = {}
        """Position → when utilisation was last read, for GPUs whose newest sample lacks it."""
        self._last_values: dict[int, dict[str, tuple[float, float]]] = {}
        """Position → reading → time and value when it was last read; only for readings that are missing
        now."""

    def observe(self, samples: Sequence[GpuSample], at_s: float) -> None:
        """Takes in one sample per GPU of the node; GPUs that are not among them are dropped."""
        before_s = self._at_s
        if at_s < before_s:
            return
        uuids = tuple([gpu.info.uuid for gpu in samples])
        if uuids != self._as_sent:
            samples = self._rearrange(uuids, samples)
        before, averages, ratio_seen_s = self._samples, self._averages, self._ratio_seen_s
        past = self._past_weight(at_s - before_s)
        new = 1 - past
        for position, gpu in enumerate(samples):
            ratio = gpu.gpu_ratio
            if isinstance(ratio, Missing):
                ratio_seen_s.setdefault(position, before_s)
            elif position in ratio_seen_s:
                own_past = self._past_weight(at_s - ratio_seen_s.pop(position))
                averages[position] = own_past * averages[position] + (1 - own_past) * ratio
            else:
                averages[position] = past * averages[position] + new * ratio
            if (
                isinstance(gpu.memory_used_bytes, Missing)
                or isinstance(gpu.memory_total_bytes, Missing)
                or isinstance(gpu.temperature_c, Missing)
                or isinstance(gpu.power_w, Missing)
            ):
                self._save_values(position, before[position])
        self._samples, self._at_s = tuple(samples), at_s

    def sample(self, uuid: str) -> GpuSample | None:
        """The GPU's newest sample; None if the node's newest sample doesn't list it."""
        position = self._positions.get(uuid)
        return None if position is None else self._samples[position]

    def signals(self, uuid: str, now_s: float) -> GpuSignals:
        """A GPU's signals at ``now_s``; all MISSING if the node's newest sample doesn't list it."""
        position = self._positions.get(uuid, -1)
        return GpuSignals(
            gpu_ratio=self._utilisation(position, now_s),
            memory_used_ratio=self._latest(position, "memory_used_ratio", now_s),
            temperature_c=self._latest(position, "temperature_c", now_s),
            power_w=self._latest(position, "power_w", now_s),
        )

    def _rearrange(self, uuids: tuple[str, ...], samples: Sequence[GpuSample]) -> Sequence[GpuSample]:
        """Moves everything to the positions of these GPUs and drops all others; returns one sample each."""
        by_uuid = {uuid: gpu for uuid, gpu in zip(uuids, samples, strict=True) if uuid}
        old_positions = self._positions
        self._positions = {uuid: position for position, uuid in enumerate(by_uuid)}
        old = [old_positions.get(uuid) for uuid in by_uuid]
        before, averages = self._samples, self._averages
        ratio_seen_s, last_values = self._ratio_seen_s, self._last_values
        self._samples = tuple(None if position is None else before[position] for position in old)
        self._averages = [0.0 if position is None else averages[position] for position in old]
        self._ratio_seen_s = {
            new: -math.inf if position is None else ratio_seen_s[position]
            for new, position in enumerate(old)
            if position is None or position in ratio_seen_s
        }
        self._last_values = {
            new: last_values[position]
            for new, position in enumerate(old)
            if position is not None and position in last_values
        }
        self.uuids = tuple(by_uuid)
        self._as_sent = uuids if len(by_uuid) == len(uuids) else None
        return tuple(by_uuid.values())

    def _save_values(self, position: int, before: GpuSample | None) -> None:
        """Saves the values of the sample ``before``, since the sample after it lacks one of them."""
        if before is not None:
            for name, read in _READINGS.items():
                value = read(before)
                if not isinstance(value, Missing):
                    self._last_values.setdefault(position, {})[name] = (self._at_s, value)

    def _past_weight(self, gap_s: float) -> float:
        """The weight of the average so far, ``gap_s`` after its last value; 0 once that counts as missing."""
        limits = self._limits
        return 0.0 if gap_s > limits.missing_after_s else math.exp2(-gap_s / limits.half_life_s)

    def _utilisation(self, position: int, now_s: float) -> Signal:
        gpu = self._samples[position] if position >= 0 else None
        if gpu is None:
            return signal_of(None, None, now_s, self._limits)
        at_s = self._ratio_seen_s.get(position, self._at_s)
        known = at_s > -math.inf
        why = gpu.gpu_ratio.reason if isinstance(gpu.gpu_ratio, Missing) else ""
        return signal_of(
            self._averages[position] if known else None, at_s if known else None, now_s, self._limits, why
        )

    def _latest(self, position: int, name: str, now_s: float) -> Signal:
        gpu = self._samples[position] if position >= 0 else None
        if gpu is None:
            return signal_of(None, None, now_s, self._limits)
        value = _READINGS[name](gpu)
        if not isinstance(value, Missing):
            return signal_of(value, self._at_s, now_s, self._limits)
        at_s, last = self._last_values.get(position, {}).get(name, (None, None))
        return signal_of(last, at_s, now_s, self._limits, value.reason)


def _used_ratio(sample: GpuSample) -> Reading[float]:
    used, total = sample.memory_used_bytes, sample.memory_total_bytes
    if isinstance(used, Missing):
        return used
    if isinstance(total, Missing):
        return total
    return used / total if total else Missing(Absence.ERROR, "the driver reports 0 bytes of GPU memory")


_READINGS: Mapping[str, Callable[[GpuSample], Reading[float]]] = MappingProxyType(
    {
        "memory_used_ratio": _used_ratio,
        "temperature_c": lambda sample: sample.temperature_c,
        "power_w": lambda sample: sample.power_w,
    }
)
