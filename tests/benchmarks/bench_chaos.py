"""What clients see of faults: failed, resumed, repeated and cut answers, latency, time to recover.

Streams and posts come at a steady rate to a tier of three simulated engines with a neighbour tier, through
two gateway replicas. Clients know the only right answer of each request and check text, usage and
finish_reason (tests/benchmarks/load.py). They do not try again.

* failed: an error was the answer, a connection broke, or something was wrong with an answer that ended well.
  A gateway replica that is killed takes its own connections with it: those are counted in
  ``lost_with_gateway`` instead.
* duplicated, truncated: the stream ended as if it were whole, but was not.
* p99 before: of requests that ended before the fault; during: of those that ran at some moment between the
  fault and the recovery; after: of those that began later.
* recovered_s: until every replica is ready again, with no breaker open, and what was killed has been
  replaced. Where an engine misbehaves for a while and is not lost, counted from the end of that.

With --vllm: kill -9 of one of two real vLLM engines while greedy streams run; their texts are compared with
those of an undisturbed run.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any

import click

from tests.benchmarks import vllm_chaos
from tests.benchmarks.faults import FAULTS, GATEWAYS, TIER, Fault, Over, whole
from tests.benchmarks.load import (
    Load,
    Outcome,
    generate,
    half_streamed,
    p99_ms,
    session,
)
from tests.support.plane import Plane, running

TOKENS = 90
NATURAL_TOKENS = 110
ENGINE = {"ttft-ms": 20, "itl-ms": 5, "tokens": NATURAL_TOKENS}
RECOVERY_LIMIT_S = 45.0
POLL_S = 0.1
BROKEN_AT_ONCE_S = 1.0
"""Connections that break so soon after a gateway replica was killed were its own."""


@click.command(name="chaos")
@click.option("--faults", default=",".join(FAULTS), show_default=True, help="Which, with commas.")
@click.option("--seconds", default=4.0, show_default=True, help="Load before each fault, and after its end.")
@click.option("--rate", default=30.0, show_default=True, help="Requests per second, half of them streams.")
@click.option("--vllm", is_flag=True, help="Instead: kill -9 a real vLLM engine (CPU, the bundled model).")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def command(faults: str, seconds: float, rate: float, vllm: bool, as_json: bool) -> None:
    """What clients see when engines, replicas, gateways and the controller are lost."""
    names = [name.strip() for name in faults.split(",") if name.strip()]
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there is {', '.join(FAULTS)}", param_hint="--faults")
    if vllm:
        rows, details = vllm_chaos.measure()
    else:
        with running(plane_args()) as plane:
            rows, details = asyncio.run(measure(plane, [FAULTS[name] for name in names], seconds, rate))
    if as_json:
        click.echo(json.dumps({"rows": rows, "details": details}))
        return
    click.echo("  ".join(f"{name:>{max(10, len(name))}}" for name in rows[0]))
    for row in rows:
        click.echo(
            "  ".join(
                f"{'' if value is None else value:>{max(10, len(name))}}" for name, value in row.items()
            )
        )
    for line in details:
        click.echo(line)


def plane_args() -> dict[str, Any]:
    """Three engines and a neighbour. Hung engines are found sooner than by default, to keep it short."""
    common = {
        "engine": "simulated",
        "engine_args": ENGINE,
        "concurrency_limit": 24,
        "health_interval_s": 1.0,
        "health_timeout_s": 1.0,
        "health_failures": 3,
        "drain_timeout_s": 2.0,
        "restart": {"max_restarts": 50},
    }
    return {
        "tiers": [{**common, "name": TIER, "replicas": 3}, {**common, "name": "spare", "replicas": 1}],
        "gateway": {"replicas": GATEWAYS, "silence_timeout_s": 2.0, "default_tier": TIER},
    }


async def measure(
    plane: Plane, faults: Sequence[Fault], seconds: float, rate: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each fault, and a line for each thing that went wrong."""
    rows, details = [], []
    async with session() as http:
        for fault in faults:
            load = Load()
            until_s = [float("inf")]
            ask = half_streamed(TIER, TOKENS, NATURAL_TOKENS)
            task = asyncio.create_task(generate(load, http, plane.url, rate, ask, partial(_first, until_s)))
            # Under load: a breaker that the fault before left open closes with the first good answers only.
            await _wait(plane, lambda: True)
            resumed = await asyncio.to_thread(plane.resumes)
            await asyncio.sleep(seconds)
            struck_s = monotonic()
            over = await asyncio.to_thread(fault.strike, plane)
            await asyncio.sleep(fault.lasts_s)
            healed_s = monotonic() if fault.lasts_s else struck_s
            recovered = await _wait(plane, over)
            whole_s = monotonic()
            await asyncio.sleep(seconds)
            until_s[0] = 0.0
            await task
            resumed = await asyncio.to_thread(plane.resumes) - resumed
            lost, rest = _own(fault, load.outcomes, struck_s)
            rows.append(
                {
                    "fault": fault.name,
                    "requests": len(load.outcomes),
                    "failed": sum(each.fate in {"failed", "broken", "shed", "wrong"} for each in rest),
                    "resumed": max(0, round(resumed)),
                    "duplicated": sum(each.fate == "duplicated" for each in rest),
                    "truncated": sum(each.fate == "truncated" for each in rest),
                    "lost_with_gateway": len(lost),
                    "p99_before_ms": p99_ms([each for each in rest if each.ended_s <= struck_s]),
                    "p99_during_ms": p99_ms(
                        [each for each in rest if each.ended_s > struck_s and each.began_s < whole_s]
                    ),
                    "p99_after_ms": p99_ms([each for each in rest if each.began_s >= whole_s]),
                    "recovered_s": round(whole_s - healed_s, 2) if recovered else None,
                }
            )
            details += [
                f"{fault.name}: {each.kind} {each.began_s - struck_s:+.2f} s to "
                f"{each.ended_s - struck_s:+.2f} s, {each.fate}: {each.detail}"
                for each in rest
                if each.fate != "ok"
            ]
    return rows, details


def _first(cell: list[float]) -> float:
    return cell[0]


def _own(fault: Fault, outcomes: Sequence[Outcome], struck_s: float) -> tuple[list[Outcome], list[Outcome]]:
    """What the killed gateway replica took with it, and the rest."""
    lost = [
        each
        for each in outcomes
        if fault.kills_gateway
        and each.fate == "broken"
        and struck_s <= each.ended_s < struck_s + BROKEN_AT_ONCE_S
    ]
    return lost, [each for each in outcomes if each not in lost]


async def _wait(plane: Plane, over: Over) -> bool:
    """Until the plane is whole in three looks (each may meet another gateway replica); False if never."""
    deadline_s = monotonic() + RECOVERY_LIMIT_S
    good = 0
    while monotonic() < deadline_s:
        good = good + 1 if await asyncio.to_thread(_look, plane, over) else 0
        if good == 3:
            return True
        await asyncio.sleep(POLL_S)
    return False


def _look(plane: Plane, over: Over) -> bool:
    try:
        return bool(over()) and whole(plane)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    command()
