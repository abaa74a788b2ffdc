"""The figures that alert rules evaluate: figure → subject → signal.

The figures of a tier's traffic come from :func:`controlplane.core.traffic.counters.named`; those of
endpoints, GPUs, nodes and the controller itself are computed here. A rule is not evaluated for a subject
without a FRESH signal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from controlplane.core.alerts import rules as names
from controlplane.core.alerts.alert import PLANE, SubjectType, Unit
from controlplane.core.domain.endpoint import SERVING, Endpoint, EndpointState
from controlplane.core.gpus.health import GpuHealth
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.node_views import node_views
from controlplane.core.reconcile.migrations import CONTROLLER, OPERATOR, TierHold
from controlplane.core.telemetry.series import Freshness, Signal, known_now

Figures: TypeAlias = Mapping[str, Mapping[str, Signal]]
"""Figure → subject → signal."""

GIB: Final = 1024**3
SHOWN_KEYS: Final = 5
"""Keys of unreadable values that an alert names."""
NODE_LOST_MIN_S: Final = 60.0
"""A lost node is reported for at least this long, even if its replicas were replaced sooner."""
_YES: Final = known_now(1.0)
_NO: Final = known_now(0.0)


@dataclass(frozen=True, slots=True)
class AlertSignals:
    """Figures, the subjects that exist, and causes of values."""

    figures: Figures
    present: Mapping[SubjectType, Collection[str]] = field(default_factory=dict)
    """Type → all its subjects. Alerts of subjects that are missing here resolve, unless the type is not a
    key."""
    details: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(figure, subject) → the cause of its value, as text."""


@dataclass(frozen=True, slots=True)
class LostNode:
    """A node that left the cluster while replicas ran on it."""

    at_s: float
    tiers: tuple[str, ...]
    """The tiers of those replicas."""


def merged(parts: Iterable[AlertSignals]) -> AlertSignals:
    """All parts together; if two have the same figure, the later one wins."""
    figures: dict[str, Mapping[str, Signal]] = {}
    present: dict[SubjectType, Collection[str]] = {}
    details: dict[tuple[str, str], str] = {}
    for part in parts:
        figures |= part.figures
        present |= part.present
        details |= part.details
    return AlertSignals(figures, present, details)


def tier_signals(
    due: Mapping[str, int],
    endpoints: Iterable[Endpoint],
    in_flight: Mapping[str, int] | None,
    holds: Mapping[str, TierHold],
) -> AlertSignals:
    """Ready and missing replicas, slots in use, and holds. ``due`` is the number of replicas that each tier
    must have now; ``in_flight`` is the number of requests by endpoint, None while no gateway reports."""
    ready = dict.fromkeys(due, 0)
    slots = dict.fromkeys(due, 0)
    busy = dict.fromkeys(due, 0)
    causes: dict[str, str] = {}
    for endpoint in endpoints:
        tier = endpoint.tier
        if tier not in ready:
            continue
        if endpoint.state in SERVING:
            ready[tier] += 1
            slots[tier] += endpoint.concurrency_limit
            busy[tier] += (in_flight or {}).get(endpoint.endpoint_id, 0)
        elif endpoint.state is not EndpointState.STOPPED:
            more = endpoint.diagnosis or endpoint.phase
            text = f"{endpoint.endpoint_id} is {endpoint.state}{f' ({more})' if more else ''}"
            causes.setdefault(tier, text)
    held = {tier: hold for tier, hold in holds.items() if hold.by == CONTROLLER and tier in due}
    figures = {
        names.TIER_DUE: {tier: known_now(count) for tier, count in due.items()},
        names.TIER_READY: {tier: known_now(count) for tier, count in ready.items()},
        names.TIER_MISSING: {tier: known_now(max(0, due[tier] - count)) for tier, count in ready.items()},
        names.TIER_HELD: {tier: known_now(tier in held) for tier in due},
    }
    if in_flight is not None:
        figures[names.TIER_SATURATION] = {
            tier: known_now(busy[tier] / count) for tier, count in slots.items() if count
        }
    details = {
        (figure, tier): text
        for tier, text in causes.items()
        for figure in (names.TIER_READY, names.TIER_MISSING)
    }
    details |= {(names.TIER_HELD, tier): hold.reason for tier, hold in held.items()}
    return AlertSignals(figures, {SubjectType.TIER: tuple(due)}, details)


def slo_signals(attainments: Mapping[str, Signal], targets: Mapping[str, float]) -> AlertSignals:
    """The burn rate of each tier's error budget: how many times as often as allowed its requests miss the SLO
    (Beyer et al., "The Site Reliability Workbook", 2018, chapter 5). ``targets`` is the ratio of requests
    that must meet it, below 1; tiers without a target are left out."""
    figures: dict[str, Signal] = {}
    details = {}
    for tier, signal in attainments.items():
        target = targets.get(tier)
        if target is None:
            continue
        if signal.value is None:
            figures[tier] = signal
            continue
        burn = (1.0 - signal.value) / (1.0 - target)
        figures[tier] = replace(signal, value=burn)
        actual, required = Unit.RATIO.text(signal.value), Unit.RATIO.text(target)
        details[names.TIER_SLO_BURN, tier] = f"{actual} of its requests met the SLO, {required} must"
    return AlertSignals({names.TIER_SLO_BURN: figures}, {}, details)


def plane_signals(*, waiting: int | None, store_warning: str, unreadable: Sequence[str] = ()) -> AlertSignals:
    """The requests in all gateways' queues, and the state of the controller's store. ``waiting`` is None
    while no gateway reports; ``store_warning`` says why the state is not saved, and is empty if it is;
    ``unreadable`` are the keys of values that were put aside."""
    figures = {
        names.STORE_UNSAFE: {PLANE: known_now(bool(store_warning))},
        names.STORE_UNREADABLE: {PLANE: known_now(len(unreadable))},
    }
    if waiting is not None:
        figures[names.QUEUE_WAITING] = {PLANE: known_now(waiting)}
    details = {(names.STORE_UNSAFE, PLANE): store_warning} if store_warning else {}
    if unreadable:
        more = f" and {len(unreadable) - SHOWN_KEYS} more" if len(unreadable) > SHOWN_KEYS else ""
        details[names.STORE_UNREADABLE, PLANE] = f"{', '.join(unreadable[:SHOWN_KEYS])}{more}"
    return AlertSignals(figures, {SubjectType.PLANE: (PLANE,)}, details)


def gpu_signals(fleet: GpuInventory, now_s: float) -> AlertSignals:
    """Utilisation, memory and temperature of every GPU, and which GPUs health checks took out of use."""
    busy: dict[str, Signal] = {}
    memory: dict[str, Signal] = {}
    temperature: dict[str, Signal] = {}
    out: dict[str, Signal] = {}
    details: dict[tuple[str, str], str] = {}
    for uuid, record in fleet.records.items():
        signals = fleet.signals(uuid, now_s)
        busy[uuid], memory[uuid] = signals.gpu_ratio, signals.memory_used_ratio
        temperature[uuid] = signals.temperature_c
        failed = record.out_of_use and not _by_operator(record.health)
        out[uuid] = _YES if failed else _NO
        if failed:
            details[names.GPU_OUT_OF_USE, uuid] = f"{record.health.state}, {record.health.reason}"
    figures = {
        names.GPU_BUSY: busy,
        names.GPU_MEMORY: memory,
        names.GPU_TEMPERATURE: temperature,
        names.GPU_OUT_OF_USE: out,
    }
    return AlertSignals(figures, {SubjectType.GPU: fleet.records.keys()}, details)


def node_signals(
    fleet: GpuInventory, lost: Mapping[str, LostNode], missing: Mapping[str, int], now_s: float
) -> AlertSignals:
    """How long each node's agent has been silent, and which nodes are lost. A node counts as lost until every
    tier that ran on it has all its replicas again; ``missing`` is the number of replicas that each tier
    lacks."""
    silent = {
        node_id: known_now(max(0.0, now_s - node.latest_s))
        for node_id, node in fleet.nodes.items()
        if node.latest_s is not None
    }
    gone = {
        node_id: known_now(
            now_s - node.at_s < NODE_LOST_MIN_S or any(missing.get(tier, 0) for tier in node.tiers)
        )
        for node_id, node in lost.items()
    }
    details = {
        (names.NODE_LOST, node_id): f"it had replicas of {', '.join(node.tiers)}"
        for node_id, node in lost.items()
    }
    memory: dict[str, Signal] = {}
    disk: dict[str, Signal] = {}
    for node in node_views(fleet, now_s=now_s):
        used = node.memory_used_ratio
        if node.freshness is not Freshness.FRESH:
            continue
        if used is not None:
            memory[node.node_id] = known_now(used)
        if node.disks:
            fullest = max(node.disks, key=lambda each: each.used_ratio)
            disk[node.node_id] = known_now(fullest.used_ratio)
            details[names.NODE_DISK, node.node_id] = (
                f"{fullest.path} has {fullest.free_bytes / GIB:.1f} GiB left"
            )
    figures = {
        names.NODE_SILENT: silent,
        names.NODE_LOST: gone,
        names.NODE_MEMORY: memory,
        names.NODE_DISK: disk,
    }
    return AlertSignals(figures, {SubjectType.NODE: {*silent, *gone}}, details)


def _by_operator(health: GpuHealth) -> bool:
    return health.rule == OPERATOR
