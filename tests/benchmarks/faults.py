"""Faults that are done to a plane under load, and how to see that each is over.

The load goes to tier ``fast`` with three engines; ``spare`` is its neighbour.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.plane import Plane

TIER = "fast"
FAULT_S = 6.0
"""How long an engine misbehaves that is not lost."""
GATEWAYS = 2

Over = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong. ``strike`` does it and gives a test of whether what was hit is back."""

    name: str
    about: str
    strike: Callable[[Plane], Over]
    lasts_s: float = 0.0
    """Seconds until the fault ends without intervention; 0 if it does not."""
    kills_gateway: bool = False


def whole(plane: Plane) -> bool:
    """Every replica is ready, no breaker is open, every gateway replica is known."""
    health = plane.get("/health")
    if health["status"] != "healthy" or health["workers"]["gateways"] != GATEWAYS:
        return False
    endpoints = [each for tier in health["tiers"].values() for each in tier["endpoints"]]
    return all(each["breaker"] == "closed" for each in endpoints)


def _signal_engines(plane: Plane, number: int, count: int) -> Over:
    hit = plane.endpoints(TIER)[:count]
    for endpoint in hit:
        os.kill(endpoint["pid"], number)
    return _replaced(plane, hit)


def _replaced(plane: Plane, hit: list[dict[str, Any]]) -> Over:
    def over() -> bool:
        ready = [each for each in plane.endpoints(TIER) if each["state"] == "ready"]
        return len(ready) == 3 and not {each["pid"] for each in hit} & {each["pid"] for each in ready}

    return over


def _misbehave(plane: Plane, **knobs: Any) -> Over:
    plane.knobs(plane.endpoints(TIER)[0], **knobs, for_s=FAULT_S)
    return lambda: True


def _kill_replica_actor(plane: Plane) -> Over:
    hit = plane.endpoints(TIER)[:1]
    plane.replica_actor(hit[0]).kill()
    return _replaced(plane, hit)


def _kill_gateway(plane: Plane) -> Over:
    before = {each["gateway_id"] for each in plane.get("/status")["gateways"]}
    plane.processes("ray::ServeReplica", "gateway")[0].kill()

    def over() -> bool:
        now = {each["gateway_id"] for each in plane.get("/status")["gateways"]}
        return len(now) == GATEWAYS and now != before

    return over


def _kill_controller(plane: Plane) -> Over:
    epoch = plane.get("/status")["snapshot"]["epoch"]
    for process in plane.processes("ray::ControllerActor"):
        process.kill()

    def over() -> bool:
        status = plane.get("/status")
        return status["snapshot"]["epoch"] != epoch and len(plane.endpoints(TIER)) == 3

    return over


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("engine", "kill -9 an engine", lambda plane: _signal_engines(plane, signal.SIGKILL, 1)),
        Fault("tier", "kill -9 all engines of the tier", lambda p: _signal_engines(p, signal.SIGKILL, 3)),
        Fault("frozen", "SIGSTOP an engine", lambda plane: _signal_engines(plane, signal.SIGSTOP, 1)),
        Fault(
            "cut",
            f"an engine cuts every stream after 5 tokens, for {FAULT_S:g} s",
            lambda plane: _misbehave(plane, cut_after_tokens=5),
            lasts_s=FAULT_S,
        ),
        Fault(
            "mute",
            f"an engine answers /health but gives no tokens, for {FAULT_S:g} s",
            lambda plane: _misbehave(plane, hang_after_tokens=0),
            lasts_s=FAULT_S,
        ),
        Fault("replica", "kill -9 the actor that supervises an engine", _kill_replica_actor),
        Fault("gateway", "kill -9 one of two gateway replicas", _kill_gateway, kills_gateway=True),
        Fault("controller", "kill -9 the controller", _kill_controller),
    )
}
"""By name, in the order of a run."""
