"""``GET /plane/…``: what the command line asks of the controller, through a gateway.

A command that connects to Ray takes seconds before it can ask anything; a gateway is connected already.
Only queries are here; what changes a plane needs Ray's token. Each result is the JSON of the value that
:class:`~controlplane.controller.api.ControllerApi` returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

import msgspec

from controlplane.core.json_values import to_value
from controlplane.core.reports.report import MAX_WINDOW_MINUTES, MIN_WINDOW_MINUTES
from controlplane.core.traffic.request_log import SessionOrder, UsageBy
from controlplane.errors import BadRequest, shown

MOST_EVENTS: Final = 10_000
MOST_SERIES: Final = 100
MOST_REQUESTS: Final = 1000
MOST_ROWS: Final = 10_000
MOST_PARAMETERS: Final = 20
PREFIX: Final = "/plane/"


@dataclass(frozen=True, slots=True)
class NoArguments:
    """A query without arguments."""


@dataclass(frozen=True, slots=True)
class EventsArguments:
    """Entries of the audit log after number ``after``; with a negative one the last ``limit``."""

    after: int = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_EVENTS)] = 1000


@dataclass(frozen=True, slots=True)
class ReportArguments:
    """A report over the minutes before now."""

    window_minutes: Annotated[float, msgspec.Meta(ge=MIN_WINDOW_MINUTES, le=MAX_WINDOW_MINUTES)] = 60.0


@dataclass(frozen=True, slots=True)
class HistoryArguments:
    """Stored points of series; in a URL, ``series`` is a list with commas."""

    series: Annotated[tuple[str, ...], msgspec.Meta(max_length=MOST_SERIES)]
    since_unix_s: float
    until_unix_s: float


@dataclass(frozen=True, slots=True)
class RequestsArguments:
    """Logged requests that ended since then: the slowest or else the newest first."""

    since_unix_s: float
    slow: bool = False
    failed: bool = False
    tier: str = ""
    session: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_REQUESTS)] = 50
    key: str = ""
    team: str = ""


@dataclass(frozen=True, slots=True)
class UsageArguments:
    """Usage in the hours of a time, by key, team, tier or session."""

    since_unix_s: float
    until_unix_s: float
    by: UsageBy = UsageBy.TEAM
    key: str = ""
    team: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_ROWS)] = 1000


@dataclass(frozen=True, slots=True)
class SessionsArguments:
    """Sessions of the hours since then, the largest first."""

    since_unix_s: float
    order: SessionOrder = SessionOrder.COST
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_REQUESTS)] = 20


ARGUMENTS: Final[Mapping[str, type[Any]]] = {
    **dict.fromkeys(("status", "activity", "alerts", "gpus", "nodes", "scaling"), NoArguments),
    "events": EventsArguments,
    "plane_report": ReportArguments,
    "history": HistoryArguments,
    "requests": RequestsArguments,
    "sessions": SessionsArguments,
    "usage": UsageArguments,
}
"""Query → its arguments. The names are those of the controller's methods."""

SUMMARIES: Final[Mapping[str, str]] = {
    "status": "for the command line: the snapshot without secrets, the tiers, recent events",
    "activity": "for the command line: migrations, restarts, holds and drains in progress",
    "alerts": "for the command line: alerts, silences and webhook deliveries",
    "gpus": "for the command line: GPUs, their health and their holders",
    "nodes": "for the command line: nodes with their CPUs, memory and disks",
    "scaling": "for the command line: targets and recommendations",
    "events": "for the command line: the audit log",
    "plane_report": "for the command line: a report on the minutes before now",
    "history": "for the command line: stored points of series",
    "requests": "for the command line: single requests that have ended, without content",
    "sessions": "for the command line: requests, tokens and GPU time by session",
    "usage": "for the command line: requests, tokens, GPU time by key, team, tier or session",
}


def json_value(found: Any) -> Any:
    """A result as JSON values. JSON has no infinite numbers, which an SLO without a limit has: they become
    the strings ``inf`` and ``-inf``, which the command line reads as numbers again."""
    return _finite(to_value(found))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse_arguments(name: str, query: str) -> dict[str, Any]:
    """The arguments of a query in a URL. Raises BadRequest that names what is wrong."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_PARAMETERS)
    except ValueError:
        raise BadRequest(f"{PREFIX}{name} takes at most {MOST_PARAMETERS} parameters") from None
    values: dict[str, Any] = dict(pairs)
    if name == "history":
        values["series"] = [each for each in values.get("series", "").split(",") if each]
    kind = ARGUMENTS[name]
    unknown = set(values) - set(kind.__dataclass_fields__)
    if unknown:
        raise BadRequest(f"{PREFIX}{name} has no parameter {shown(', '.join(sorted(unknown)))}")
    try:
        arguments = asdict(msgspec.convert(values, kind, strict=False))
    except msgspec.ValidationError as error:
        raise BadRequest(f"{PREFIX}{name}: {error}") from error
    for parameter, value in arguments.items():
        if isinstance(value, float) and not isfinite(value):
            raise BadRequest(f"{PREFIX}{name}: {parameter} must be a finite number", param=parameter)
    return arguments
