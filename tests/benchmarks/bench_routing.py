"""What a request costs in the core: routing, admission, breakers and load accounting, without any I/O.

Three tiers of four ready endpoints, fresh metrics of each. Every row is the best of several rounds, per
request, on one core.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from timeit import repeat

import click

from controlplane.core.admission.queue import AdmissionQueue
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.request import Complexity
from controlplane.core.routing.dispatcher import Dispatcher, Started, WaitsInQueue
from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.core.routing.router import choose_endpoint
from controlplane.core.routing.tier_table import RouteRequest, TierPolicy, TierTable, resolve

TIERS = ("lightweight", "balanced", "capable")
NOW_S = 1000.0
DEADLINE_S = NOW_S + 600.0


def plane(endpoints_per_tier: int) -> Dispatcher:
    """A plane at rest."""
    table = TierTable.build([TierPolicy(name, name + "-model") for name in TIERS])
    endpoint_table = EndpointTable(table)
    base = Endpoint("", "", "m", "vllm", "http://127.0.0.1:1", EndpointState.READY, 10, generation=1)
    endpoint_table.apply(
        replace(base, endpoint_id=f"{tier}-{index}", tier=tier)
        for tier in TIERS
        for index in range(endpoints_per_tier)
    )
    for load in endpoint_table.by_endpoint_id.values():
        load.observe(NOW_S, kv_usage_ratio=0.3, waiting=0.0)
    return Dispatcher(endpoint_table, AdmissionQueue())


def decision(dispatcher: Dispatcher, session_key: int | None) -> Callable[[], None]:
    """Decides and no more."""
    picks = iter(range(1_000_000_000))
    table = dispatcher.endpoint_table.tier_table

    def run() -> None:
        request = RouteRequest(complexity=Complexity.SIMPLE, session_key=session_key)
        route = resolve(request, table)
        choose_endpoint(route, request, dispatcher.endpoint_table, NOW_S, next(picks))

    return run


def life(dispatcher: Dispatcher, session_key: int | None) -> Callable[[], None]:
    """A request's whole way: decided, begun, first token, ended."""
    picks = iter(range(1_000_000_000))
    table = dispatcher.endpoint_table.tier_table

    def run() -> None:
        request = RouteRequest(complexity=Complexity.SIMPLE, session_key=session_key)
        result = dispatcher.submit(
            request, resolve(request, table), NOW_S, next(picks), deadline_s=DEADLINE_S
        )
        assert isinstance(result, Started)
        result.slot.first_token(NOW_S + 0.1)
        result.slot.succeed(NOW_S + 1.0)
        if dispatcher.queue:
            dispatcher.pump(NOW_S, 0)

    return run


def queued(dispatcher: Dispatcher, waiting: int) -> Callable[[], None]:
    """All tiers full and ``waiting`` in the queue: one ends, the next one starts, another one queues."""
    running: list[Started] = []
    picks = iter(range(1_000_000_000))

    request = RouteRequest(complexity=Complexity.SIMPLE)

    def submit() -> Started | WaitsInQueue:
        number = next(picks)
        result = dispatcher.submit(
            request,
            resolve(request, dispatcher.endpoint_table.tier_table),
            NOW_S,
            number,
            deadline_s=DEADLINE_S + number % 97,
            caller=f"caller-{number % 20}",
        )
        assert isinstance(result, Started | WaitsInQueue)
        return result

    while isinstance(result := submit(), Started):
        running.append(result)
    for _ in range(waiting - 1):
        submit()

    def run() -> None:
        running.pop(0).slot.succeed(NOW_S)
        running.extend(dispatcher.pump(NOW_S, next(picks)))
        submit()

    return run


@click.command()
@click.option("--endpoints", default=4, show_default=True, help="Endpoints of each of the three tiers.")
@click.option("--rounds", default=7, show_default=True, help="The best of so many counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(endpoints: int, rounds: int, as_json: bool) -> None:
    """What a request costs in routing, admission and breakers, in microseconds."""
    cases = [
        ("decide", decision(plane(endpoints), None)),
        ("decide, with a session", decision(plane(endpoints), 123_456_789)),
        ("whole life", life(plane(endpoints), None)),
        ("whole life, with a session", life(plane(endpoints), 123_456_789)),
        ("through a queue of 100", queued(plane(endpoints), 100)),
        ("through a queue of 900", queued(plane(endpoints), 900)),
    ]
    rows = []
    for name, run in cases:
        number = 2_000 if "queue" in name else 10_000
        best_s = min(repeat(run, number=number, repeat=rounds)) / number
        rows.append({"case": name, "endpoints_per_tier": endpoints, "us_per_request": round(best_s * 1e6, 2)})
    if as_json:
        click.echo(json.dumps({"rows": rows}))
        return
    for row in rows:
        click.echo(f"{row['case']:<30} {row['us_per_request']:>8.2f} µs")


if __name__ == "__main__":
    command()
