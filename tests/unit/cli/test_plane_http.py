"""Queries of the command line through a gateway: the same values as from the controller itself."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from controlplane.cli import controller_access, plane_http
from controlplane.cli.controller_access import PlaneAccess
from controlplane.cli.plane_http import GatewayUnreachable
from controlplane.controller.api import ControllerApi
from controlplane.core.alerts.views import AlertsResponse
from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.cluster.tier_spec import ScalingPlan, TierSpec
from controlplane.core.domain.event import Event
from controlplane.core.domain.request import RequestShape
from controlplane.core.recommendations.log import TrackRecord
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reports.recorded_traffic import Point
from controlplane.core.reports.report import plane_report
from controlplane.core.traffic.request_log import (
    LoggedRequest,
    RequestsView,
    SessionOrder,
    SessionsView,
    SessionUsage,
    UsageBy,
    UsageSums,
    UsageView,
)
from controlplane.errors import BadRequest, ControllerUnreachable, SetupError
from controlplane.gateway.api.operator_queries import ARGUMENTS, parse_arguments
from tests.support.controller import World
from tests.support.gateway import running

USED = UsageSums("k", "agent", "search", "", "", 3, 1, 50, 20, 0.5, 1.5, 2, 0.25, 9.0)
LOGGED = LoggedRequest(
    *(
        1.0,
        "r",
        "s",
        "small",
        "small",
        "e",
        "auto",
        "chat",
        True,
        "ok",
        "200",
        1,
        2,
        0.1,
        None,
        1.0,
        1,
        0,
        0.5,
    ),
)
EVENT = Event(7, 1.5, "cordon", "GPU-1", 'said "stop"', "balanced", "ada")


PLAN = ScalingPlan(
    ScalingRule("balanced", EngineSpeed(1e-2, 1e-3, 1e-4), RequestShape(10, 10)), autoscaled=True, ceiling=4
)
"""Its SLO has no limit for the whole response: an infinite number."""


def values() -> dict[str, Any]:
    world = World({"n1": ["GPU-1", "GPU-2"]}, {"balanced": 1})
    for _ in range(8):
        world.step()
    controller = world.controller
    span: dict[str, Any] = {"from_unix_s": 0.0, "until_unix_s": 3600.0, "step_s": 30}
    return {
        "status": (
            world.registry.snapshot(secrets=False),
            (TierSpec("balanced", "m", "simulated", 2, 10, scaling=PLAN),),
            (EVENT,),
        ),
        "gpus": controller.gpus(),
        "nodes": controller.nodes(),
        "events": (EVENT,),
        "activity": controller.activity(),
        "alerts": AlertsResponse((), (), ()),
        "scaling": ScalingReport("advise", (), (), TrackRecord(0, 0, 0, None)),
        "plane_report": plane_report({}, {}, tiers={}, present=[], **span),
        "history": {"tier/balanced/arrived": [Point(60, 60, 3, 1.25)]},
        "requests": RequestsView((LOGGED,), 5, 6, 7, 2.0),
        "sessions": SessionsView((SessionUsage("s", 1, 0, 5, 6, 0.5, 9.0),), 1),
        "usage": UsageView(UsageBy.TEAM, (USED,), 0.0, 3600.0, 2.0),
    }


class Played:
    """A controller with fixed values."""

    def __init__(self) -> None:
        self.values = values()
        self.asked: list[tuple[str, Mapping[str, Any]]] = []

    async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
        self.asked.append((name, arguments))
        return self.values[name]

    async def gpus(self) -> Any:
        raise NotImplementedError

    async def nodes(self) -> Any:
        raise NotImplementedError

    async def plane_report(self, window_minutes: float) -> Any:
        raise NotImplementedError

    async def scaling(self) -> Any:
        raise NotImplementedError


CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "status": (ControllerApi.status, (), {}),
    "gpus": (ControllerApi.gpus, (), {}),
    "nodes": (ControllerApi.nodes, (), {}),
    "events": (ControllerApi.events, (-1, 50), {"after": -1, "limit": 50}),
    "activity": (ControllerApi.activity, (), {}),
    "alerts": (ControllerApi.alerts, (), {}),
    "scaling": (ControllerApi.scaling, (), {}),
    "plane_report": (ControllerApi.plane_report, (5.0,), {"window_minutes": 5.0}),
    "history": (
        ControllerApi.history,
        (("a", "b"), 1.0, 2.5),
        {"series": ("a", "b"), "since_unix_s": 1.0, "until_unix_s": 2.5},
    ),
    "requests": (
        ControllerApi.requests,
        (1.5, True, False, "a&b", "s=1", 7),
        {
            **{
                "since_unix_s": 1.5,
                "slow": True,
                "failed": False,
                "tier": "a&b",
                "session": "s=1",
                "limit": 7,
            },
            **{"key": "", "team": ""},
        },
    ),
    "sessions": (
        ControllerApi.sessions,
        (1.5, SessionOrder.TOKENS, 7),
        {"since_unix_s": 1.5, "order": SessionOrder.TOKENS, "limit": 7},
    ),
    "usage": (
        ControllerApi.usage,
        (1.5, 2.5, UsageBy.KEY, "agent", "search", 7),
        {
            **{"since_unix_s": 1.5, "until_unix_s": 2.5, "by": UsageBy.KEY, "key": "agent", "team": "search"},
            "limit": 7,
        },
    ),
}


async def test_every_query_gives_what_the_controller_gave() -> None:
    assert set(CALLS) == set(ARGUMENTS)
    async with running() as rig:
        played = Played()
        rig.gateway.controller = played
        for name, (method, args, arguments) in CALLS.items():
            found = await asyncio.to_thread(plane_http.query, rig.base, method, *args)
            assert found == played.values[name], name
            assert played.asked[-1] == (name, arguments)


async def test_what_is_wrong_with_an_argument_is_said() -> None:
    async with running() as rig:
        rig.gateway.controller = Played()
        with pytest.raises(SetupError, match="limit"):
            await asyncio.to_thread(plane_http.query, rig.base, ControllerApi.events, 0, 10**9)
        async with rig.client.get(rig.base + "/plane/events?lmit=3") as response:
            assert response.status == 400
            assert "no parameter lmit" in await response.text()


@pytest.mark.parametrize(("name", "query"), [("events", "limit=0"), ("plane_report", "window_minutes=nan"),
                                             ("history", "series=a"), ("gpus", "x=1")])  # fmt: skip
def test_arguments_have_bounds(name: str, query: str) -> None:
    with pytest.raises(BadRequest, match=f"/plane/{name}"):
        parse_arguments(name, query)


async def test_without_a_gateway_or_its_controller_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Away(Played):
        async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
            raise ControllerUnreachable("gone", retry_after_s=1)

    def call_controller(namespace: str, ray: str, method: Any, *args: Any) -> Any:
        asked.append(method.__name__)
        return ()

    from controlplane.ray_cluster import plane

    monkeypatch.setattr(plane, "call_controller", call_controller)
    monkeypatch.setattr(controller_access, "connected_ray", lambda _: contextlib.nullcontext())
    async with running() as rig:
        rig.gateway.controller = Away()
        for url in (rig.base, "http://127.0.0.1:9"):
            with PlaneAccess("ray", "tierplane", url, ask_gateway=True) as access:
                assert await asyncio.to_thread(access.call, ControllerApi.gpus) == ()
        with pytest.raises(GatewayUnreachable):
            await asyncio.to_thread(plane_http.query, rig.base, ControllerApi.gpus)
    assert asked == ["gpus", "gpus"]


def test_commands_that_only_query_import_neither_ray_nor_the_configuration() -> None:
    program = (
        "import sys, controlplane.cli.lifecycle.status, controlplane.cli.operating.events; "
        "print([name for name in ('ray', 'pydantic', 'structlog') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ray_is_imported_only_after_its_token_is_in_the_environment() -> None:
    """Ray reads its token when it is imported: a command that imports it earlier is refused by the plane."""
    script = """
import contextlib, sys
from controlplane.cli import controller_access
from controlplane.controller.api import ControllerApi

def connect(address):
    assert "ray" not in sys.modules
    raise SystemExit(7)

controller_access.connected_ray = connect
controller_access.PlaneAccess("127.0.0.1:1", "tierplane").call(ControllerApi.drain, "small")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr[-2000:]
