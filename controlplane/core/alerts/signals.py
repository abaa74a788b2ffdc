"""Figures that alert rules judge, as the control loop is told them: figure → subject → signal.

Whoever knows a figure supplies it under its name. What a tier's traffic says comes from
:func:`controlplane.core.traffic.counters.named`; here are those that follow from endpoints, GPUs, nodes and
the controller itself. A subject without a signal, or with one that is not FRESH, is not judged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from controlplane.core.alerts import rules as names
from controlplane.core.alerts.book import PLANE, SubjectType, Unit
from controlplane.core.domain.endpoint import SERVING, Endpoint, EndpointState
from controlplane.core.gpus.health import GpuHealth
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.reconcile.migrations import CONTROLLER, OPERATOR, TierHold
from controlplane.core.telemetry.series import Signal, known_now

Figures: TypeAlias = Mapping[str, Mapping[str, Signal]]
"""Figure → subject → signal."""

LOST_TOLD_S: Final = 60.0
"""A lost node counts as such for at least so long, also if everything was replaced before."""


@dataclass(frozen=True, slots=True)
class AlertSignals:
    """Some figures, with the subjects that there are and what is known of causes."""

    figures: Figures
    present: Mapping[SubjectType, Collection[str]] = field(default_factory=dict)
    """Every subject of a kind. One that is not named here any more is gone, and its alerts with it."""
    details: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Figure and subject → why it is as it is, for people."""


@dataclass(frozen=True, slots=True)
class LostNode:
    """A node that is gone with replicas of ours."""

    at_s: float
    tiers: tuple[str, ...]
    """Which had endpoints there."""


def joined(parts: Iterable[AlertSignals]) -> AlertSignals:
    """All of them together; of two that supply one figure, the later counts."""
    figures: dict[str, Mapping[str, Signal]] = {}
    present: dict[SubjectType, Collection[str]] = {}
    details: dict[tuple[str, str], str] = {}
    for part in parts:
        figures |= part.figures
        present |= part.present
        details |= part.details
    return AlertSignals(figures, present, details)


def of_tiers(
    due: Mapping[str, int],
    endpoints: Iterable[Endpoint],
    in_flight: Mapping[str, int] | None,
    holds: Mapping[str, TierHold],
) -> AlertSignals:
    """Ready endpoints, those that are missing, places taken, holds. ``due`` are the replicas that have to
    be there of each tier; ``in_flight`` requests by endpoint, None where that is not known."""
    ready = dict.fromkeys(due, 0)
    slots = dict.fromkeys(due, 0)
    taken = dict.fromkeys(due, 0)
    why: dict[str, str] = {}
    for endpoint in endpoints:
        tier = endpoint.tier
        if tier not in ready:
            continue
        if endpoint.state in SERVING:
            ready[tier] += 1
            slots[tier] += endpoint.concurrency_limit
            taken[tier] += (in_flight or {}).get(endpoint.endpoint_id, 0)
        elif endpoint.state is not EndpointState.STOPPED:
            told = endpoint.diagnosis or endpoint.phase
            why.setdefault(tier, f"{endpoint.endpoint_id} is {endpoint.state}{f' ({told})' if told else ''}")
    held = {tier: hold for tier, hold in holds.items() if hold.by == CONTROLLER and tier in due}
    figures = {
        names.TIER_DUE: {tier: known_now(count) for tier, count in due.items()},
        names.TIER_READY: {tier: known_now(count) for tier, count in ready.items()},
        names.TIER_MISSING: {tier: known_now(max(0, due[tier] - count)) for tier, count in ready.items()},
        names.TIER_HELD: {tier: known_now(tier in held) for tier in due},
    }
    if in_flight is not None:
        figures[names.TIER_SATURATION] = {
            tier: known_now(taken[tier] / places) for tier, places in slots.items() if places
        }
    details = {
        (figure, tier): text
        for tier, text in why.items()
        for figure in (names.TIER_READY, names.TIER_MISSING)
    }
    details |= {(names.TIER_HELD, tier): hold.reason for tier, hold in held.items()}
    return AlertSignals(figures, {SubjectType.TIER: tuple(due)}, details)


def of_slos(attainments: Mapping[str, Signal], targets: Mapping[str, float]) -> AlertSignals:
    """How many times as often as its SLO allows each tier's requests miss it (the burn rate of its error
    budget: Beyer et al., "The Site Reliability Workbook", 2018, chapter 5). ``targets`` are the shares that
    must keep it, below 1; a tier without one is not judged."""
    figures: dict[str, Signal] = {}
    details = {}
    for tier, signal in attainments.items():
        target = targets.get(tier)
        if target is None:
            continue
        if signal.value is None:
            figures[tier] = signal
            continue
        figures[tier] = replace(signal, value=slo_burn(signal.value, target))
        kept, promised = Unit.RATIO.text(signal.value), Unit.RATIO.text(target)
        details[names.TIER_SLO_BURN, tier] = f"{kept} keep it, {promised} are promised"
    return AlertSignals({names.TIER_SLO_BURN: figures}, {}, details)


def slo_burn(attainment: float, target: float) -> float:
    """The share that misses an SLO over the share that may: above 1 it is not kept."""
    return (1.0 - attainment) / (1.0 - target)


def of_plane(*, waiting: int | None, store_warning: str) -> AlertSignals:
    """The queue of all gateways (None: none reports), and whether the controller's memory is safe."""
    figures = {names.STORE_UNSAFE: {PLANE: known_now(bool(store_warning))}}
    if waiting is not None:
        figures[names.QUEUE_WAITING] = {PLANE: known_now(waiting)}
    details = {(names.STORE_UNSAFE, PLANE): store_warning} if store_warning else {}
    return AlertSignals(figures, {SubjectType.PLANE: (PLANE,)}, details)


def of_gpus(fleet: GpuInventory, now_s: float) -> AlertSignals:
    """Readings of every GPU, and which ones their own health took out of use."""
    busy: dict[str, Signal] = {}
    memory: dict[str, Signal] = {}
    heat: dict[str, Signal] = {}
    out: dict[str, Signal] = {}
    details: dict[tuple[str, str], str] = {}
    for uuid, record in fleet.records.items():
        signals = fleet.signals(uuid, now_s)
        busy[uuid], memory[uuid], heat[uuid] = (
            signals.gpu_ratio,
            signals.memory_used_ratio,
            signals.temperature_c,
        )
        failed = record.out_of_use and not _by_operator(record.health)
        out[uuid] = _YES if failed else _NO
        if failed:
            details[names.GPU_OUT_OF_USE, uuid] = f"{record.health.state}, {record.health.reason}"
    figures = {
        names.GPU_BUSY: busy,
        names.GPU_MEMORY: memory,
        names.GPU_TEMPERATURE: heat,
        names.GPU_OUT_OF_USE: out,
    }
    return AlertSignals(figures, {SubjectType.GPU: fleet.records.keys()}, details)


def of_nodes(
    fleet: GpuInventory, lost: Mapping[str, LostNode], missing: Mapping[str, int], now_s: float
) -> AlertSignals:
    """How long each node's agent has been silent, and which nodes are lost: one counts until every tier
    that ran there has all its replicas again. ``missing`` are the replicas that each tier lacks."""
    silent = {
        node_id: known_now(max(0.0, now_s - node.latest_s))
        for node_id, node in fleet.nodes.items()
        if node.latest_s is not None
    }
    gone = {
        node_id: known_now(
            now_s - node.at_s < LOST_TOLD_S or any(missing.get(tier, 0) for tier in node.tiers)
        )
        for node_id, node in lost.items()
    }
    details = {
        (names.NODE_LOST, node_id): f"it had replicas of {', '.join(node.tiers)}"
        for node_id, node in lost.items()
    }
    figures = {names.NODE_SILENT: silent, names.NODE_LOST: gone}
    return AlertSignals(figures, {SubjectType.NODE: {*silent, *gone}}, details)


_YES: Final = known_now(1.0)
_NO: Final = known_now(0.0)


def _by_operator(health: GpuHealth) -> bool:
    return health.rule == OPERATOR
