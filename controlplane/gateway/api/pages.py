"""JSON pages about the gateway and the tiers: ``/``, ``/v1/models``, ``/v1/route``, ``/health``,
``/status``, ``/usage``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from controlplane import __version__
from controlplane.config import PlaneConfig
from controlplane.core.access.principal import Principal
from controlplane.core.access.roles import Permission
from controlplane.core.admission.queue import AdmissionQueue
from controlplane.core.cluster.snapshot import ClusterSnapshot, TierMode, TierNote
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.domain.request import Priority
from controlplane.core.routing.endpoint_table import EndpointTable, TierPool
from controlplane.core.routing.router import Overflow
from controlplane.core.routing.router import explain as explain_route
from controlplane.core.routing.tier_table import AUTO, TierTable, no_such_model
from controlplane.errors import UnknownModel
from controlplane.gateway.request_context import route_request
from controlplane.gateway.telemetry.accounting import Usage, UsageLedger
from controlplane.http.fetch import fetch
from controlplane.http.messages import Request

FETCH_TIMEOUT_S: Final = 2.0
MAX_FETCH_BYTES: Final = 8 * 1024 * 1024


def models(
    endpoint_table: EndpointTable, created_unix_s: int, context_tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """OpenAI's model list: ``auto``, the tiers and the models behind them. ``context_tokens`` has the tokens
    of one request, by tier; ``max_model_len`` of a model that several tiers serve is the least of theirs."""
    table = endpoint_table.tier_table
    names = [AUTO, *(policy.name for policy in table.policies), *table.listed_models()]
    data = [
        _model_entry(endpoint_table, name, created_unix_s, context_tokens) for name in dict.fromkeys(names)
    ]
    return {"object": "list", "data": data}


def model(
    endpoint_table: EndpointTable, created_unix_s: int, context_tokens: Mapping[str, int | None], name: str
) -> dict[str, Any]:
    """The entry of one model, whose ``name`` comes from an address. Raises :class:`UnknownModel`."""
    table = endpoint_table.tier_table
    for candidate in (name, unquote(name)):  # behind Serve's ingress it is already decoded
        if candidate == AUTO or candidate in table.rank_of or candidate in table.tiers_of_model:
            return _model_entry(endpoint_table, candidate, created_unix_s, context_tokens)
    raise UnknownModel(no_such_model([unquote(name)], table), param="model")


def _model_entry(
    endpoint_table: EndpointTable, name: str, created_unix_s: int, context_tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """One model as OpenAI's list has it: ``auto``, a tier, or a model of one or several tiers."""
    table = endpoint_table.tier_table
    if name == AUTO:
        tiers = list(table.rank_of)
    elif name in table.rank_of:
        tiers = [name]
    else:
        tiers = [table.policies[rank].name for rank in table.tiers_of_model[name]]
    pools = [pool for pool in endpoint_table.pools if pool.name in tiers]
    limits = [limit for tier in tiers if (limit := context_tokens.get(tier)) is not None]
    return {
        "id": name,
        "object": "model",
        "created": created_unix_s,
        "owned_by": "tierplane",
        "tier": None if name == AUTO else tiers[0],
        "ready": any(load.ready for pool in pools for load in pool.loads),
        "max_model_len": min(limits, default=None),
    }


def root() -> dict[str, Any]:
    """What a client finds at ``/``."""
    return {
        "name": "tierplane",
        "version": __version__,
        "openai_base_url": "/v1",
        "models": "/v1/models",
        "health": "/health",
        "ui": "/ui",
        "openapi": "/openapi.json",
    }


def explain(request: Request, endpoint_table: EndpointTable, now_s: float) -> dict[str, Any]:
    """Where the router would send a request, and the reasons for every endpoint. The request is not sent."""
    explanation = explain_route(route_request(request), endpoint_table, now_s, 0)
    decision, route = explanation.decision, explanation.route
    table = endpoint_table.tier_table
    return {
        "outcome": decision.outcome,
        "tier": decision.tier or None,
        "endpoint": decision.load.endpoint.endpoint_id if decision.load else None,
        "reason": decision.reason,
        "refusal": decision.refusal,
        "message": decision.message,
        "spilled": decision.overflow is Overflow.SPILL,
        "bridged": decision.overflow is Overflow.BRIDGE,
        "tiers": {
            "asked_for": _names(table, route.order),
            "spill": _names(table, route.spill),
            "bridge": _names(table, route.bridge),
            "floor": table.policies[route.floor].name if route.floor else None,
        },
        "endpoints": [
            {
                "endpoint": candidate.endpoint_id,
                "tier": candidate.tier,
                "left_out": list(candidate.left_out),
                "score": None if candidate.score is None else round(candidate.score, 4),
                "scores": {name: round(value, 4) for name, value in candidate.scores.items()},
                "affinity": candidate.home,
            }
            for candidate in explanation.candidates
        ],
    }


def _names(table: TierTable, ranks: tuple[int, ...]) -> list[str]:
    return [table.policies[rank].name for rank in ranks]


def health(
    config: PlaneConfig,
    endpoint_table: EndpointTable,
    queue: AdmissionQueue,
    snapshot: ClusterSnapshot | None,
    unix_s: float,
) -> dict[str, Any]:
    """``healthy``: every tier has all its replicas, or none on purpose; ``unhealthy``: no tier has any; else
    ``degraded``. ``unix_s`` is the time now."""
    silent = dict(snapshot.silent) if snapshot else {}
    tiers = {
        tier.name: _tier_health(
            pool,
            snapshot.target_replicas(tier.name, tier.replicas) if snapshot else tier.replicas,
            snapshot.note_of(tier.name) if snapshot else None,
            {key: unix_s - reported_unix_s for key, reported_unix_s in silent.items()},
        )
        for tier, pool in zip(config.tiers, endpoint_table.pools, strict=True)
    }
    states = {value["status"] for value in tiers.values()}
    if states <= {"healthy", "idle", "drained"}:
        status = "healthy"
    elif states & {"healthy", "degraded"}:
        status = "degraded"
    else:
        status = "unhealthy"
    gateways = snapshot.gateways if snapshot else ()
    return {
        "status": status,
        "why": _reasons(snapshot, tiers),
        "tiers": tiers,
        "queue": {
            "depth": len(queue),
            "capacity": queue.settings.capacity,
            "by_priority": {str(priority): queue.depth(priority) for priority in Priority},
        },
        "workers": {
            "gateways": max(1, len(gateways)),
            "in_flight": sum(pool.in_flight for pool in endpoint_table.pools),
            "endpoints": len(endpoint_table.by_endpoint_id),
        },
        "snapshot": None if snapshot is None else {"epoch": snapshot.epoch, "version": snapshot.version},
    }


def _reasons(snapshot: ClusterSnapshot | None, tiers: dict[str, Any]) -> str:
    if snapshot is None:
        return "the controller has not reported yet"
    return "; ".join(f"{name}: {tier['why']}" for name, tier in tiers.items() if tier["why"])


def _tier_health(
    pool: TierPool, target: int, note: TierNote | None, silent_s: Mapping[str, float]
) -> dict[str, Any]:
    """``silent_s``: for how long each endpoint that has missed reports has not reported."""
    ready = sum(load.ready for load in pool.loads)
    mode = note.mode if note is not None else None
    if mode is TierMode.DRAINED:
        status, target = "drained", 0
    elif ready >= target:
        status = "healthy" if ready else "idle"
    elif not ready and (mode is TierMode.STARTING or _all_starting(pool)):
        status = "starting"
    else:
        status = "degraded" if ready else "unhealthy"
    reasons = []
    if note is not None:
        since = datetime.fromtimestamp(note.since_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        reasons.append(f"{note.reason} (since {since})")
    elif not pool.loads and target:
        reasons.append("no replica has reported yet")
    for load in pool.loads:
        quiet_s = silent_s.get(load.endpoint.endpoint_id)
        if quiet_s is not None:
            reasons.append(f"{load.endpoint.endpoint_id} has not reported for {quiet_s:.0f} s")
        if not load.ready and load.endpoint.state is not EndpointState.STOPPED:
            detail = load.endpoint.diagnosis or load.endpoint.phase
            reasons.append(
                f"{load.endpoint.endpoint_id} is {load.endpoint.state}{f' ({detail})' if detail else ''}"
            )
    return {
        "status": status,
        "why": "; ".join(reasons),
        "replicas": {"ready": ready, "wanted": target},
        "in_flight": pool.in_flight,
        "limit": pool.limit,
        "endpoints": [
            {
                "endpoint": load.endpoint.endpoint_id,
                "state": load.endpoint.state,
                "breaker": load.breaker.state,
                "in_flight": load.in_flight,
            }
            for load in pool.loads
        ],
    }


def _all_starting(pool: TierPool) -> bool:
    """Whether the tier has endpoints, none of which has ever been ready."""
    states = {load.endpoint.state for load in pool.loads}
    return states == {EndpointState.STARTING}


def status(config: PlaneConfig, snapshot: ClusterSnapshot | None) -> dict[str, Any]:
    """The last snapshot, without its secrets."""
    if snapshot is None:
        return {
            "snapshot": None,
            "tiers": [tier.name for tier in config.tiers],
            "endpoints": [],
            "gateways": [],
            "modes": [],
        }
    endpoints = []
    silent = dict(snapshot.silent)
    for endpoint in snapshot.endpoints:
        value = asdict(endpoint)
        del value["secret"]
        value["silent_since_unix_s"] = silent.get(endpoint.endpoint_id)
        endpoints.append(value)
    return {
        "snapshot": {"epoch": snapshot.epoch, "version": snapshot.version, "unix_s": snapshot.unix_s},
        "tiers": [tier.name for tier in config.tiers],
        "endpoints": endpoints,
        "gateways": [asdict(gateway) for gateway in snapshot.gateways],
        "modes": [asdict(note) for note in snapshot.notes],
    }


def usage(ledger: UsageLedger, query: str, principal: Principal) -> dict[str, Any]:
    """Requests, tokens and GPU-seconds that this gateway replica served, by tier or for ``?session=ID``.

    A principal sees the usage of its team, or its own if it has none. Who may read everything sees that of
    all, and with ``?team=NAME`` that of one team; sessions are found by their team's name, too."""
    asked = parse_qs(query)
    session, team = (asked.get(name, [""])[0] for name in ("session", "team"))
    reads_all = principal.role.allows(Permission.READ)
    owner = team if reads_all else principal.team or principal.id
    if session:
        found = ledger.session(owner, session)
        return {"session": session, "usage": None if found is None else _usage(found)}
    tiers = ledger.tiers if reads_all and not team else ledger.of_owner(owner)
    return {"tiers": {name: _usage(value) for name, value in tiers.items()}}


def _usage(value: Usage) -> dict[str, Any]:
    return {
        "requests": value.requests,
        "prompt_tokens": value.prompt_tokens,
        "generated_tokens": value.generated_tokens,
        "gpu_seconds": round(value.gpu_seconds, 6),
        "next_tier_gpu_seconds": round(value.next_tier_gpu_seconds, 6),
        "requests_without_next_tier_price": value.unpriced_requests,
    }


async def fetch_text(url: str) -> str:
    """A small text from another gateway replica; ``""`` if it can't be fetched."""
    page = await fetch(url, timeout_s=FETCH_TIMEOUT_S, max_bytes=MAX_FETCH_BYTES)
    return page.text if page.ok else ""
