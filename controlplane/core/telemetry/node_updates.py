"""What a node agent sends to a reader that polls it: its newest sample, without what the reader has cached.

Most of a sample consists of facts about each GPU that rarely change, such as links, temperature limits and
remapped memory rows (:class:`~controlplane.core.telemetry.samples.GpuInfo`). The agent numbers each version
of these facts. The reader sends the number of its cached version, and the agent includes the facts only if
that number is out of date. Numbers belong to one agent process (its ``epoch``), so the first update after a
restart of the agent or the reader is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, Final

from controlplane.core.telemetry.samples import GpuEvent, GpuInfo, GpuSample, NodeSample

NOTHING_CACHED: Final = ("", 0)
"""Sent by a reader that has no :class:`GpuInfoCache` of the node."""

_readings = attrgetter(*(item.name for item in fields(GpuSample) if item.name != "info"))


@dataclass(frozen=True, slots=True)
class GpuInfoCache:
    """One version of the facts about a node's GPUs that rarely change."""

    epoch: str
    number: int
    """From 1; a larger number is newer."""
    gpus: tuple[GpuInfo, ...]
    """In the order of the samples' GPUs."""

    @property
    def key(self) -> tuple[str, int]:
        """Identifies this version."""
        return self.epoch, self.number


@dataclass(frozen=True, slots=True)
class NodeUpdate:
    """An agent's response to a poll."""

    sample: NodeSample | None
    """The newest sample, with its GPUs left out; None before the first."""
    readings: tuple[tuple[Any, ...], ...]
    """For each GPU: the fields of :class:`~controlplane.core.telemetry.samples.GpuSample` except ``info``, in
    their order."""
    infos_key: tuple[str, int]
    """The version of the infos that belongs to the readings."""
    infos: GpuInfoCache | None
    """None if the reader has that version already."""
    events: tuple[GpuEvent, ...]


def node_update(
    sample: NodeSample | None, infos: GpuInfoCache, events: Sequence[GpuEvent], cached: tuple[str, int]
) -> NodeUpdate:
    """The response to a reader that has the infos with the key ``cached``."""
    sent = None if infos.key == cached else infos
    if sample is None:
        return NodeUpdate(sample=None, readings=(), infos_key=infos.key, infos=sent, events=tuple(events))
    return NodeUpdate(
        sample=replace(sample, gpus=()),
        readings=tuple(_readings(gpu) for gpu in sample.gpus),
        infos_key=infos.key,
        infos=sent,
        events=tuple(events),
    )


def whole_sample(update: NodeUpdate, cached: GpuInfoCache | None) -> NodeSample | None:
    """The sample as the agent took it, put together from the update and the reader's ``cached`` infos.

    None if there is no sample yet, or if neither of them has the version of the infos that the sample needs:
    then the reader has to poll with :data:`NOTHING_CACHED`.
    """
    infos = update.infos or cached
    if update.sample is None or infos is None or infos.key != update.infos_key:
        return None
    gpus = zip(infos.gpus, update.readings, strict=True)
    return replace(update.sample, gpus=tuple(GpuSample(info, *readings) for info, readings in gpus))
