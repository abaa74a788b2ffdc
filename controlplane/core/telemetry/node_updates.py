"""What a node agent tells a reader that asks again and again: its newest sample, without what the reader has.

Most of a sample is what rarely changes of each GPU: links, peers, limits
(:class:`~controlplane.core.telemetry.samples.GpuInfo`). An agent numbers it, a reader says the number that it
has, and only another one is sent. A number is of one agent process (``epoch``): who starts anew, agent or
reader, begins with everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, Final

from controlplane.core.telemetry.samples import GpuEvent, GpuInfo, GpuSample, NodeSample

NO_INFOS: Final = ("", 0)
"""Said by a reader that has none."""

_readings = attrgetter(*(item.name for item in fields(GpuSample) if item.name != "info"))


@dataclass(frozen=True, slots=True)
class GpuInfoCache:
    """What rarely changes of a node's GPUs, as an agent had it for some samples."""

    epoch: str
    number: int
    """From 1; a larger one is newer."""
    gpus: tuple[GpuInfo, ...]
    """In the order of the samples' GPUs."""

    @property
    def key(self) -> tuple[str, int]:
        """Which they are."""
        return self.epoch, self.number


@dataclass(frozen=True, slots=True)
class NodeUpdate:
    """An agent's answer."""

    sample: NodeSample | None
    """The newest, without its GPUs; None before the first."""
    readings: tuple[tuple[Any, ...], ...]
    """Of each GPU: the fields of :class:`~controlplane.core.telemetry.samples.GpuSample` but ``info``, in its
    order."""
    infos_key: tuple[str, int]
    """Which infos belong to the readings."""
    infos: GpuInfoCache | None
    """None: the reader has them."""
    events: tuple[GpuEvent, ...]


def node_update(
    sample: NodeSample | None, infos: GpuInfoCache, events: Sequence[GpuEvent], known: tuple[str, int]
) -> NodeUpdate:
    """The answer to a reader that has the infos of ``known``."""
    told = None if infos.key == known else infos
    if sample is None:
        return NodeUpdate(None, (), infos.key, told, tuple(events))
    readings = tuple(_readings(gpu) for gpu in sample.gpus)
    return NodeUpdate(replace(sample, gpus=()), readings, infos.key, told, tuple(events))


def whole_sample(news: NodeUpdate, infos: GpuInfoCache | None) -> NodeSample | None:
    """The sample as the agent took it, with the infos that came along or that the reader has. None: there is
    none yet, or those are others, and all has to be asked for anew."""
    infos = news.infos or infos
    if news.sample is None or infos is None or infos.key != news.infos_key:
        return None
    gpus = zip(infos.gpus, news.readings, strict=True)
    return replace(news.sample, gpus=tuple(GpuSample(info, *readings) for info, readings in gpus))
