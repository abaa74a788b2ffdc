"""What the control plane knows of the GPUs of one node right now, from its agent's samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from controlplane.core.telemetry.samples import Absence, GpuSample, Missing, Reading
from controlplane.core.telemetry.series import DEFAULT_LIMITS, FreshnessLimits, Signal, judge


@dataclass(frozen=True, slots=True)
class GpuSignals:
    """One GPU now; ratios are averaged over the half-life, the rest is the newest value."""

    gpu_ratio: Signal
    memory_used_ratio: Signal
    memory_free_bytes: Signal
    temperature_c: Signal
    power_w: Signal


class GpuTelemetry:
    """The recent past of the GPUs of one node: the last sample of each, the last value of what is missing
    there, and the average of its utilisation. There are thousands, so there are no windows, and no object
    for each."""

    __slots__ = (
        *("_as_sent", "_at_s", "_averages", "_kept", "_late", "_limits", "_places", "_samples", "uuids"),
    )

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self.uuids: tuple[str, ...] = ()
        """Of the GPUs that the last sample names, in its order."""
        self._as_sent: tuple[str, ...] | None = None
        """The same, if each was named once and none lacks a UUID: the next sample is likely to be alike."""
        self._places: dict[str, int] = {}
        """UUID → the place in everything here that goes by place."""
        self._at_s = -math.inf
        self._samples: tuple[GpuSample | None, ...] = ()
        self._averages: list[float] = []
        self._late: dict[int, float] = {}
        """Place → when the utilisation was there last, of those whose last sample lacks it."""
        self._kept: dict[int, dict[str, tuple[float, float]]] = {}
        """Place → reading → when it was there last, and its value; of those that are missing now."""

    def observe(self, samples: Sequence[GpuSample], at_s: float) -> None:
        """Takes in a sample of every GPU of the node; one that is not there is forgotten."""
        before_s = self._at_s
        if at_s < before_s:
            return
        named = tuple([gpu.info.uuid for gpu in samples])
        if named != self._as_sent:
            samples = self._arrange(named, samples)
        before, averages, late = self._samples, self._averages, self._late
        keep = self._weight(at_s - before_s)
        new = 1 - keep
        for place, gpu in enumerate(samples):
            ratio = gpu.gpu_ratio
            if isinstance(ratio, Missing):
                late.setdefault(place, before_s)
            elif place in late:
                own = self._weight(at_s - late.pop(place))
                averages[place] = own * averages[place] + (1 - own) * ratio
            else:
                averages[place] = keep * averages[place] + new * ratio
            if (
                isinstance(gpu.memory_used_bytes, Missing)
                or isinstance(gpu.memory_total_bytes, Missing)
                or isinstance(gpu.memory_free_bytes, Missing)
                or isinstance(gpu.temperature_c, Missing)
                or isinstance(gpu.power_w, Missing)
            ):
                self._keep(place, before[place])
        self._samples, self._at_s = tuple(samples), at_s

    def sample(self, uuid: str) -> GpuSample | None:
        """The last one of the GPU; None if it is not there."""
        place = self._places.get(uuid)
        return None if place is None else self._samples[place]

    def signals(self, uuid: str, now_s: float) -> GpuSignals:
        """Everything about a GPU at ``now_s``; all MISSING for one that is not there."""
        place = self._places.get(uuid, -1)
        return GpuSignals(
            gpu_ratio=self._utilisation(place, now_s),
            memory_used_ratio=self._latest(place, "memory_used_ratio", now_s),
            memory_free_bytes=self._latest(place, "memory_free_bytes", now_s),
            temperature_c=self._latest(place, "temperature_c", now_s),
            power_w=self._latest(place, "power_w", now_s),
        )

    def _arrange(self, named: tuple[str, ...], samples: Sequence[GpuSample]) -> Sequence[GpuSample]:
        """Makes room for these GPUs and no others; answers with one sample of each."""
        known = {uuid: gpu for uuid, gpu in zip(named, samples, strict=True) if uuid}
        places, self._places = self._places, {uuid: place for place, uuid in enumerate(known)}
        old = [places.get(uuid) for uuid in known]
        before, averages, late, kept = self._samples, self._averages, self._late, self._kept
        self._samples = tuple(None if place is None else before[place] for place in old)
        self._averages = [0.0 if place is None else averages[place] for place in old]
        self._late = {
            new: -math.inf if place is None else late[place]
            for new, place in enumerate(old)
            if place is None or place in late
        }
        self._kept = {
            new: kept[place] for new, place in enumerate(old) if place in kept and place is not None
        }
        self.uuids = tuple(known)
        self._as_sent = named if len(known) == len(named) else None
        return tuple(known.values())

    def _keep(self, place: int, before: GpuSample | None) -> None:
        """The sample that comes now lacks something that the one before may have had."""
        if before is not None:
            for name, read in _READINGS.items():
                value = read(before)
                if not isinstance(value, Missing):
                    self._kept.setdefault(place, {})[name] = (self._at_s, value)

    def _weight(self, gap_s: float) -> float:
        """Of the past, after ``gap_s``; before a long gap it says nothing about now."""
        limits = self._limits
        return 0.0 if gap_s > limits.missing_after_s else math.exp2(-gap_s / limits.half_life_s)

    def _utilisation(self, place: int, now_s: float) -> Signal:
        gpu = self._samples[place] if place >= 0 else None
        if gpu is None:
            return judge(None, None, now_s, self._limits)
        at_s = self._late.get(place, self._at_s)
        known = at_s > -math.inf
        why = gpu.gpu_ratio.reason if isinstance(gpu.gpu_ratio, Missing) else ""
        return judge(
            self._averages[place] if known else None, at_s if known else None, now_s, self._limits, why
        )

    def _latest(self, place: int, name: str, now_s: float) -> Signal:
        gpu = self._samples[place] if place >= 0 else None
        if gpu is None:
            return judge(None, None, now_s, self._limits)
        value = _READINGS[name](gpu)
        if not isinstance(value, Missing):
            return judge(value, self._at_s, now_s, self._limits)
        at_s, kept = self._kept.get(place, {}).get(name, (None, None))
        return judge(kept, at_s, now_s, self._limits, value.reason)


def _used_ratio(sample: GpuSample) -> Reading[float]:
    used, total = sample.memory_used_bytes, sample.memory_total_bytes
    if isinstance(used, Missing):
        return used
    if isinstance(total, Missing):
        return total
    return used / total if total else Missing(Absence.ERROR, "the GPU says that it has no memory")


_READINGS: Mapping[str, Callable[[GpuSample], Reading[float]]] = MappingProxyType(
    {
        "memory_used_ratio": _used_ratio,
        "memory_free_bytes": lambda sample: sample.memory_free_bytes,
        "temperature_c": lambda sample: sample.temperature_c,
        "power_w": lambda sample: sample.power_w,
    }
)
