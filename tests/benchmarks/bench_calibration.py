"""Calibration: what the simulator predicts of a run, beside what was measured on a live plane.

``simulated``: a tier of simulated engines on Serve that scales (mode apply) under a load that steps up and
down. The simulator is given the same arrivals, the same settings, and the cold start that was measured.
``vllm``: one real vLLM engine on the CPU with the bundled model. Its speed is measured with one and with four
requests at once; then Poisson arrivals are played, and the simulator is given the speed and the same
arrivals.

Rows: ``engine, figure, measured, predicted, error_percent``. Latencies are of whole answers, in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import aiohttp
import click
from rich.table import Table

from controlplane.cli.console import stdout
from controlplane.config import PlaneConfig, parse_plane
from controlplane.core.domain.request import RequestShape
from controlplane.simulation.engine import SimulatedTiming
from controlplane.simulation.options import Options
from controlplane.simulation.policies import MakePolicy, StaticPolicy, per_tier, reactive_policy
from controlplane.simulation.results import SimulationResult
from controlplane.simulation.scenario import Scenario
from controlplane.simulation.scenario_builder import build_scenario
from controlplane.simulation.simulator import replay
from controlplane.simulation.trace_rows import Arrival
from tests.benchmarks.load import percentile
from tests.benchmarks.load_steps import Run, Step, run_steps
from tests.support.plane import Plane, running

TIER = "only"
TOKENS = 40
PROMPT_TOKENS = 14
WITHIN_S = 1.5
"""What counts as in time at the simulated engine."""
IN_TIME = 1.8
"""At the real one: as many times what it takes when it is idle, as it is there."""
SEED = 7
WARM_S = 30.0
VLLM_TOKENS = 24
SEQUENCES = 4
VLLM_PROMPT = "Tell me something about the sea."


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure twice."""

    name: str
    measured: float
    predicted: float

    @property
    def error_percent(self) -> float | None:
        """Of the prediction; None where nothing was measured."""
        return 100.0 * (self.predicted - self.measured) / self.measured if self.measured else None


@click.command()
@click.option(
    "--engine", "engines", type=click.Choice(["simulated", "vllm"]), multiple=True, help="Default: both."
)
@click.option("--scale", default=1.0, show_default=True, help="How long the steps last, by 30, 60 and 60 s.")
@click.option("--seconds", default=120.0, show_default=True, help="How long vLLM is loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(engines: tuple[str, ...], scale: float, seconds: float, as_json: bool) -> None:
    """Compare the simulator's prediction with live runs."""
    rows = []
    for engine in engines or ("simulated", "vllm"):
        click.echo(f"{engine}: starting a plane …", err=True)
        figures = scaling_run(scale) if engine == "simulated" else vllm_run(seconds)
        rows += [
            {
                "engine": engine,
                "figure": each.name,
                "measured": round(each.measured, 3),
                "predicted": round(each.predicted, 3),
                "error_percent": None if each.error_percent is None else round(each.error_percent, 1),
            }
            for each in figures
        ]
    if as_json:
        click.echo(json.dumps({"rows": rows}))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("engine", "figure", "measured", "predicted", "error %"):
        table.add_column(head, justify="left" if head in {"engine", "figure"} else "right")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    stdout().print(table)


# --- a tier that scales -----------------------------------------------------------------------------------


def scaling_run(scale: float) -> list[Figure]:
    """The load steps up and down on simulated engines."""
    tier: dict[str, Any] = {
        **{"name": TIER, "engine": "simulated", "concurrency_limit": 4, "spill": "none"},
        "engine_args": {"ttft_ms": 50, "itl_ms": 20, "tokens": TOKENS},
        "expected": {"requests_per_s": 1, "input_tokens": PROMPT_TOKENS, "output_tokens": TOKENS},
        "slo": {"ttft_s": WITHIN_S, "itl_s": 1.0},
        "scaling": {"min_replicas": 1, "max_replicas": 4, "hold_s": 20.0},
    }
    args = {"tiers": [tier], "controller": {"heartbeat_s": 0.5, "scaling": {"mode": "apply", "tick_s": 1.0}}}
    steps = [Step(2.0, 30 * scale), Step(12.0, 60 * scale), Step(2.0, 60 * scale)]
    with running(args) as plane:
        # A plane that has just started knows nothing of its load yet: that is not what is compared.
        asyncio.run(run_steps(plane, TIER, [Step(2.0, WARM_S)], tokens=TOKENS, seed=SEED + 100))
        run = asyncio.run(run_steps(plane, TIER, steps, tokens=TOKENS, seed=SEED))
        cold_start_s = plane.get("/recommendations")["tiers"][0]["cold_start_s"]
    wrong = [outcome for outcome in run.load.outcomes if outcome.fate != "ok"]
    if wrong:
        raise click.ClickException(f"{len(wrong)} requests were not answered: {wrong[0].detail}")
    end_s = sum(step.seconds for step in steps)
    arrivals = [
        Arrival(outcome.began_s - run.began_s, PROMPT_TOKENS, TOKENS)
        for outcome in sorted(run.load.outcomes, key=lambda outcome: outcome.began_s)
    ]
    options = Options(cold_start_s=cold_start_s, tick_s=1.0)
    scenario = build_scenario(parse_plane(args), options, RequestShape(PROMPT_TOKENS, TOKENS))
    predicted = replay(scenario, reactive_policy("tierplane"), arrivals)
    took_ms = [outcome.latency_ms for outcome in run.load.outcomes]
    return [*_latencies(took_ms, predicted, WITHIN_S), *_replicas(run, predicted, end_s)]


def _replicas(run: Run, predicted: SimulationResult, end_s: float) -> list[Figure]:
    samples = predicted.tiers[0].samples
    grown = next((look.at_s for look in run.looks if look.ready > 1), 0.0)
    grown_there = next((sample.at_s for sample in samples if sample.ready > 1), 0.0)
    return [
        Figure("replica-hours", run.replica_s(end_s) / 3600, predicted.tiers[0].replica_hours),
        Figure("most replicas", run.most(), max(sample.ready for sample in samples)),
        Figure("second replica ready, s", grown, grown_there),
    ]


def _latencies(measured_ms: Sequence[float], predicted: SimulationResult, within_s: float) -> list[Figure]:
    there_ms = [value * 1e3 for value in predicted.tiers[0].record.total_s]

    def both(name: str, of: Callable[[Sequence[float]], float | None]) -> Figure:
        return Figure(name, of(measured_ms) or 0.0, of(there_ms) or 0.0)

    return [
        Figure("requests", len(measured_ms), len(there_ms)),
        both("latency p50, ms", lambda values: percentile(values, 0.5)),
        both("latency p95, ms", lambda values: percentile(values, 0.95)),
        both("latency p99, ms", lambda values: percentile(values, 0.99)),
        both("latency mean, ms", statistics.fmean),
        both("answered in time, %", lambda v: 100.0 * sum(each <= within_s * 1e3 for each in v) / len(v)),
    ]


# --- real vLLM --------------------------------------------------------------------------------------------


def vllm_run(seconds: float) -> list[Figure]:
    """One engine on the CPU, its speed measured first."""
    tier: dict[str, Any] = {
        **{"name": TIER, "model": "bundled:smollm2-135m", "device": "cpu", "concurrency_limit": SEQUENCES},
        "engine_args": {"dtype": "float32", "enforce-eager": True, "max-model-len": 1024},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    args = {"tiers": [tier]}
    with running(args) as plane:
        timing, prompt_tokens = asyncio.run(_measure(plane))
        round_s = SEQUENCES * timing.ttft_s + (VLLM_TOKENS - 1) * timing.step_s(SEQUENCES, 0.0)
        capacity_per_s = SEQUENCES / round_s
        per_s = 0.5 * capacity_per_s
        click.echo(f"vllm: {timing}; {per_s:.2f} requests/s for {seconds:g} s", err=True)
        begun, took_ms = asyncio.run(_poisson(plane, per_s, seconds))
    arrivals = [Arrival(at_s, prompt_tokens, VLLM_TOKENS) for at_s in begun]
    scenario = _with_timing(parse_plane(args), timing, prompt_tokens)
    predicted = replay(scenario, _static(1), arrivals)
    idle_s = timing.ttft_s + (VLLM_TOKENS - 1) * timing.itl_s
    return _latencies(took_ms, predicted, IN_TIME * idle_s)


def _static(replicas: int) -> MakePolicy:
    return per_tier(lambda _: StaticPolicy(replicas))


def _with_timing(config: PlaneConfig, timing: SimulatedTiming, prompt_tokens: int) -> Scenario:
    scenario = build_scenario(config, Options(max_replicas=1), RequestShape(prompt_tokens, VLLM_TOKENS))
    (tier,) = scenario.tiers
    engine = replace(tier.replica.engine, timing=timing)
    return replace(scenario, tiers=(replace(tier, replica=replace(tier.replica, engine=engine)),))


async def _measure(plane: Plane) -> tuple[SimulatedTiming, int]:
    """The engine's time to first token, step with one sequence, and what each more costs."""
    async with aiohttp.ClientSession() as http:
        await _stream(http, plane)
        alone = [await _stream(http, plane) for _ in range(5)]
        four = [
            each
            for _ in range(3)
            for each in await asyncio.gather(*(_stream(http, plane) for _ in range(SEQUENCES)))
        ]
        _, prompt_tokens = await _ask(http, plane, 1)
    ttft_s = statistics.median(first_s for first_s, _ in alone)
    itl_s = statistics.median(itl_s for _, itl_s in alone)
    itl_four_s = statistics.median(itl_s for _, itl_s in four)
    slowdown = max(0.0, (itl_four_s / itl_s - 1.0) / (SEQUENCES - 1))
    timing = SimulatedTiming(ttft_s, itl_s, slowdown, parallel_prompts=False, kv_bound=True)
    return timing, prompt_tokens


async def _stream(http: aiohttp.ClientSession, plane: Plane) -> tuple[float, float]:
    """Seconds to the first token, and from each to the next."""
    began_s, at_s = monotonic(), []
    async with http.post(
        f"{plane.url}/v1/chat/completions", json=_body(VLLM_TOKENS) | {"stream": True}
    ) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                at_s.append(monotonic())
        if answer.status != 200 or len(at_s) < 2:
            raise click.ClickException(f"the engine answered {answer.status}, {len(at_s)} pieces of text")
    return at_s[0] - began_s, (at_s[-1] - at_s[0]) / (VLLM_TOKENS - 1)


def _body(tokens: int) -> dict[str, Any]:
    return {
        **{"model": TIER, "temperature": 0, "max_tokens": tokens, "ignore_eos": True},
        "messages": [{"role": "user", "content": VLLM_PROMPT}],
    }


async def _ask(http: aiohttp.ClientSession, plane: Plane, tokens: int) -> tuple[float, int]:
    began_s = monotonic()
    async with http.post(f"{plane.url}/v1/chat/completions", json=_body(tokens)) as answer:
        value = await answer.json()
        if answer.status != 200:
            raise click.ClickException(f"the engine answered {answer.status}: {value}")
    return monotonic() - began_s, int(value["usage"]["prompt_tokens"])


async def _poisson(plane: Plane, per_s: float, seconds: float) -> tuple[list[float], list[float]]:
    """When each request began, and how long it took in milliseconds."""
    chance = random.Random(SEED)
    began_s = monotonic()
    begun: list[float] = []
    async with aiohttp.ClientSession() as http:
        tasks: list[Awaitable[tuple[float, int]]] = []
        at_s = chance.expovariate(per_s)
        while at_s < seconds:
            await asyncio.sleep(max(0.0, began_s + at_s - monotonic()))
            begun.append(at_s)
            tasks.append(asyncio.ensure_future(_ask(http, plane, VLLM_TOKENS)))
            at_s += chance.expovariate(per_s)
        took = await asyncio.gather(*tasks)
    return begun, [seconds_taken * 1e3 for seconds_taken, _ in took]


if __name__ == "__main__":
    command()
