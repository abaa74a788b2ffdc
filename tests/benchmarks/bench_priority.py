"""What overload does to each priority: latency and shed requests at half and at twice the capacity.

One tier of two simulated engines; capacity is slots divided by the time an answer takes. Requests come by a
Poisson process (a fixed seed), a fifth of them high, two fifths each normal and low, each with the same
deadline. Latency is until the answer is whole, of those that were answered; shed are those refused with 429
or 408. The goal: at twice the capacity, high priority's p99 stays within 1.5 times its p99 at half of it,
and low priority still gets through.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from statistics import median
from time import monotonic
from typing import Any

import click

from tests.benchmarks.load import Kind, Load, Question, generate, p99_ms, question, session
from tests.support.plane import Plane, running

TIER = "only"
ENGINES = 2
SLOTS = 8
"""Of each engine."""
TTFT_MS, ITL_MS, TOKENS = 50.0, 5.0, 50
SERVICE_S = (TTFT_MS + ITL_MS * (TOKENS - 1)) / 1e3
CAPACITY_PER_S = ENGINES * SLOTS / SERVICE_S
PRIORITIES = ("high", "normal", "low", "normal", "low")
DEADLINE_S = 8.0
LOADS = (0.5, 2.0)


@click.command(name="priority")
@click.option("--seconds", default=15.0, show_default=True, help="Load at each ratio.")
@click.option(
    "--reserved", type=float, help="gateway.queue.reserved_ratio: slots kept for high; its own default."
)
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def command(seconds: float, reserved: float | None, as_json: bool) -> None:
    """Latency and shed requests of each priority at half and twice the capacity."""
    with running(plane_args(reserved)) as plane:
        rows = asyncio.run(measure(plane, seconds))
    high = {row["load_ratio"]: row["p99_ms"] for row in rows if row["priority"] == "high"}
    ratio = round(high[LOADS[1]] / high[LOADS[0]], 2) if all(high.values()) else None
    if as_json:
        click.echo(
            json.dumps({"rows": rows, "high_p99_ratio": ratio, "capacity_per_s": round(CAPACITY_PER_S)})
        )
        return
    click.echo("  ".join(f"{name:>10}" for name in rows[0]))
    for row in rows:
        click.echo("  ".join(f"{'' if value is None else value:>10}" for value in row.values()))
    click.echo(
        f"\ncapacity {CAPACITY_PER_S:.0f} requests/s; high priority's p99 at twice the capacity is {ratio} "
        f"times that at half of it"
    )


def plane_args(reserved: float | None = None) -> dict[str, Any]:
    """One gateway replica, so that there is one queue."""
    tier = {
        "name": TIER,
        "engine": "simulated",
        "engine_args": {"ttft-ms": TTFT_MS, "itl-ms": ITL_MS, "tokens": TOKENS},
        "replicas": ENGINES,
        "concurrency_limit": SLOTS,
        "drain_timeout_s": 2.0,
    }
    queue = {} if reserved is None else {"reserved_ratio": reserved}
    return {"tiers": [tier], "gateway": {"replicas": 1, "queue": queue}}


async def measure(plane: Plane, seconds: float) -> list[dict[str, Any]]:
    """Three rows for each load."""
    rows = []
    async with session() as http:
        for ratio in LOADS:
            load = Load()
            until_s = partial(_same, monotonic() + seconds)
            await generate(load, http, plane.url, ratio * CAPACITY_PER_S, _ask, until_s, poisson_seed=7)
            for priority in ("high", "normal", "low"):
                mine = [each for each in load.outcomes if each.priority == priority]
                wrong = [each for each in mine if each.fate not in {"ok", "shed"}]
                if wrong:
                    raise click.ClickException(f"an answer was {wrong[0].fate}: {wrong[0].detail}")
                rows.append(_row(ratio, priority, mine))
    return rows


def _row(ratio: float, priority: str, outcomes: Sequence[Any]) -> dict[str, Any]:
    fine = [each.latency_ms for each in outcomes if each.fate == "ok"]
    return {
        "load_ratio": ratio,
        "priority": priority,
        "requests": len(outcomes),
        "ok": len(fine),
        "shed": len(outcomes) - len(fine),
        "p50_ms": round(median(fine), 1) if fine else None,
        "p99_ms": p99_ms(outcomes),
    }


def _same(value: float) -> float:
    return value


def _ask(number: int) -> tuple[Question, dict[str, str]]:
    kind: Kind = "stream" if number % 2 else "post"
    headers = {
        "x-priority": PRIORITIES[number % len(PRIORITIES)],
        "x-request-timeout-seconds": f"{DEADLINE_S:g}",
    }
    return question(number, kind, TIER, TOKENS, TOKENS), headers


if __name__ == "__main__":
    command()
