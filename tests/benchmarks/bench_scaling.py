"""Scaling: SLO attainment and GPU hours of tierplane's policy, HPA, KPA, Ray Serve's, static and an oracle.

Every policy runs on the same simulated fleet (`tierplane simulate`): one tier of Qwen3-8B with up to 16
requests at once, on an L4, or on an H100 if the trace's prompts are long. A trace that needs a larger fleet
is thinned to about --fleet replicas. Without --trace, a synthetic day is used. ``oracle_ratio`` is the GPU
hours divided by the oracle's; ``better`` names the policies that are better than tierplane's on both axes,
with their target if it isn't the default (``kpa@0.5``).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from controlplane.cli.console import stdout
from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.simulation import oracle
from controlplane.simulation.options import Options
from controlplane.simulation.policies import NAMES, TARGETS, reactive_policy
from controlplane.simulation.results import SimulationResult
from controlplane.simulation.scenario import Scenario
from controlplane.simulation.scenario_builder import build_scenario
from controlplane.simulation.simulator import replay
from controlplane.simulation.trace_rows import Arrival
from controlplane.simulation.traces import read_trace

MODEL = "Qwen/Qwen3-8B"
LIMIT = 16
"""Concurrency limit of a replica."""
LONG_TOKENS = 4000
"""Traces whose mean prompt is longer get the larger GPU and the looser SLO."""
SHORT = ("L4", Slo(4.0, 0.3))
LONG = ("H100-80G", Slo(30.0, 0.5))
OTHER_GOALS = (0.9, 0.95, 0.98, 0.995, 0.999)
"""Further attainment goals of tierplane's policy for its frontier."""
_RATIOS = (0.4, 0.5, 0.6, 0.8, 0.9, 1.0)
OTHER_TARGETS = {
    "static": (0.7, 0.8, 0.9, 1.1, 1.25),
    "hpa": (0.5, 0.6, 0.7, 0.9, 0.95),
    "hpa-slots": _RATIOS,
    "kpa": _RATIOS,
    "serve": _RATIOS,
}
"""Further targets of the other policies for theirs: the best target for a trace isn't known in advance."""
FRAME_RATIO = 3.5
"""The picture shows up to this multiple of the fewest GPU hours."""
FRAME_MISSED = 30.0
"""The picture shows up to this percentage of requests that missed the SLO."""
PEEK_RATIO = 0.002
"""Share of a trace that is read to estimate the size of the fleet, if it has millions of requests."""
EPSILON = 1e-4
"""Attainments that differ by less count as equal."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in memory, their GPU model and SLO."""

    name: str
    arrivals: Sequence[Arrival]
    gpu: str
    slo: Slo
    mean_request: RequestShape


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one trace."""

    policy: str
    goal: float
    """Attainment goal of tierplane's policy and the oracle."""
    target: float | None
    """Target of the other policies."""
    result: SimulationResult
    default: bool
    """With the default goal and target; other runs are for the frontier."""

    @property
    def name(self) -> str:
        """The policy's name, with its goal or target if that isn't the default."""
        setting = self.goal if self.target is None else self.target
        return self.policy if self.default else f"{self.policy}@{setting:g}"


@click.command()
@click.option(
    "--trace",
    "paths",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A file with arrivals; repeatable. Default: a made-up day.",
)
@click.option(
    "--cold-start-s",
    "colds",
    type=click.FloatRange(0),
    multiple=True,
    default=(10.0, 60.0, 600.0),
    show_default=True,
    help="Cold start of a replica; repeatable.",
)
@click.option("--policy", "policies", type=click.Choice(NAMES), multiple=True, help="Default: all.")
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="Length of the part of a trace that is replayed.",
)
@click.option(
    "--skip-hours",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Length of its beginning that is left out.",
)
@click.option(
    "--fleet", type=click.FloatRange(1), default=8.0, show_default=True, help="Mean number of replicas."
)
@click.option(
    "--attainment",
    type=click.FloatRange(0.5, 1.0),
    default=0.99,
    show_default=True,
    help="Share of requests that must meet the SLO.",
)
@click.option(
    "--frontier",
    is_flag=True,
    help=f"Also run tierplane's policy with {OTHER_GOALS} and the others with other targets.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random numbers.")
@click.option(
    "--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw attainment against GPU hours."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    paths: tuple[Path, ...],
    colds: tuple[float, ...],
    policies: tuple[str, ...],
    hours: float,
    skip_hours: float,
    fleet: float,
    attainment: float,
    frontier: bool,
    seed: int,
    svg: Path | None,
    as_json: bool,
) -> None:
    """SLO attainment and GPU hours of scaling policies on recorded arrivals."""
    names = policies or NAMES
    traces = [_read(path, hours, skip_hours, fleet, seed) for path in paths] or [_synthetic_day(seed)]
    plan = [*_plan(names, attainment, frontier=frontier)]
    rows: list[dict[str, Any]] = []
    total = len(traces) * len(colds) * len(plan)
    done, started_s = 0, time.monotonic()
    for trace in traces:
        for cold_s in colds:
            runs = []
            for name, goal, target, default in plan:
                found = _run(trace, cold_s, name, goal, target, seed)
                runs.append(Run(name, goal, target, found, default))
                done += 1
                click.echo(
                    f"[{done}/{total}, {time.monotonic() - started_s:.0f} s] {trace.name}, cold start "
                    f"{cold_s:g} s, {runs[-1].name}: {found.attainment:.2%}, {found.gpu_hours:.2f} GPU h",
                    err=True,
                )
            rows += _rows(trace, cold_s, runs)
    if svg is not None:
        _draw(rows, svg)
    if as_json:
        click.echo(json.dumps({"rows": rows}))
        return
    table = Table(title=f"goal: {attainment:.0%} at the fewest GPU hours")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("trace", "policy", "better") else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    stdout().print(table)


def _plan(
    names: Sequence[str], goal: float, *, frontier: bool
) -> Iterable[tuple[str, float, float | None, bool]]:
    """Policy, goal, target, and whether these are the defaults."""
    for name in names:
        yield name, goal, TARGETS.get(name), True
    for name in names if frontier else ():
        if name == "tierplane":
            yield from ((name, other, None, False) for other in OTHER_GOALS)
        yield from ((name, goal, other, False) for other in OTHER_TARGETS.get(name, ()))


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a column for each cold start and a row for each trace; further left and down is better.

    A line connects the results of one policy with different goals or targets, and the large mark is the
    default. Results that cost or miss much more than the others are outside the frame.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    traces, colds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("trace", "cold_start_s"))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    goal = rows[0]["goal"]
    figure = Figure(figsize=(4 * len(colds), 2.6 * len(traces) + 0.6), layout="constrained")
    axes = figure.subplots(len(traces), len(colds), squeeze=False)
    for line, trace in enumerate(traces):
        for column, cold_s in enumerate(colds):
            axis = axes[line, column]
            shown = [row for row in rows if (row["trace"], row["cold_start_s"]) == (trace, cold_s)]
            for number, (policy, marker) in enumerate(zip(policies, "o^vsDXP*", strict=False)):
                of_policy = [row for row in shown if row["policy"] == policy]
                of_policy.sort(key=lambda row: (row["goal"], row["target"] or 0.0))
                points = [(row["gpu_hours"], _missed(row)) for row in of_policy]
                settings = [(row["goal"], row["target"]) for row in of_policy]
                tierplane = policy == "tierplane"
                style: dict[str, Any] = {"color": f"C{number}", "zorder": 3 if tierplane else 2}
                width = 1.4 if tierplane else 0.6
                axis.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=width, **style)
                default = points[settings.index((goal, TARGETS.get(policy)))]
                axis.scatter(*default, marker=marker, s=50, label=policy, **style)
            axis.axhline(100 * (1 - goal), color="0.7", linewidth=0.8)
            axis.set_xscale("log")
            axis.set_yscale("log")
            fewest = min(row["gpu_hours"] for row in shown)
            axis.set_xlim(0.95 * fewest, min(axis.get_xlim()[1], FRAME_RATIO * fewest))
            axis.set_ylim(top=min(axis.get_ylim()[1], FRAME_MISSED))
            for direction in (axis.xaxis, axis.yaxis):
                direction.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                direction.set_major_formatter("{x:g}")
                direction.set_minor_formatter(NullFormatter())
            axis.set_title(f"{trace[:34]}, cold start {cold_s:g} s", fontsize=8)
            axis.tick_params(labelsize=7, which="both")
    figure.supxlabel("GPU hours", fontsize=9)
    figure.supylabel("missed the SLO, %", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "tierplane", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _missed(row: dict[str, Any]) -> float:
    """Percentage of requests that missed the SLO; at least 0.01, for a logarithmic axis."""
    return max(100 * (1 - float(row["slo_attainment"])), 0.01)


def _rows(trace: Trace, cold_s: float, runs: Sequence[Run]) -> Iterable[dict[str, Any]]:
    defaults = {run.policy: run.result for run in runs if run.default}
    oracle_run, tierplane = defaults.get("oracle"), defaults.get("tierplane")
    others = [run for run in runs if run.policy not in ("tierplane", "oracle")]
    for run in runs:
        better = ""
        if run.policy == "tierplane":
            better = " ".join(other.name for other in others if _beats(other.result, run.result))
        elif tierplane is not None and run.policy != "oracle" and _beats(tierplane, run.result):
            better = "tierplane"
        yield {
            "trace": trace.name,
            "cold_start_s": cold_s,
            "policy": run.policy,
            "goal": run.goal,
            "target": run.target,
            "slo_attainment": round(run.result.attainment, 5),
            "gpu_hours": round(run.result.gpu_hours, 3),
            "oracle_ratio": round(run.result.gpu_hours / oracle_run.gpu_hours, 3) if oracle_run else None,
            "requests": run.result.requests,
            "better": better,
        }


def _beats(one: SimulationResult, other: SimulationResult) -> bool:
    """Whether ``one`` is at least as good as ``other`` on both axes and better on one."""
    no_worse = one.attainment >= other.attainment - EPSILON and one.gpu_hours <= other.gpu_hours
    return no_worse and (one.attainment > other.attainment + EPSILON or one.gpu_hours < other.gpu_hours)


def _run(
    trace: Trace, cold_s: float, name: str, attainment: float, target: float | None, seed: int
) -> SimulationResult:
    scenario = _scenario(trace, cold_s, attainment, seed)
    if name == "oracle":
        return oracle.run_oracle(scenario, trace.arrivals, attainment)
    if name == "static":
        return oracle.run_static(scenario, trace.arrivals, 1.0 if target is None else target)
    return replay(scenario, reactive_policy(name, target), trace.arrivals, name)


def _scenario(trace: Trace, cold_s: float, attainment: float, seed: int) -> Scenario:
    tier = TierConfig(name="tier", model=MODEL, concurrency_limit=LIMIT)
    options = Options(
        gpu=trace.gpu, cold_start_s=cold_s, slo=replace(trace.slo, attainment=attainment), seed=seed
    )
    scenario = build_scenario(PlaneConfig(tiers=[tier]), options, trace.mean_request)
    # The fleet at the beginning of the trace: what the first five minutes need, plus 30 %.
    needed = oracle.needed_replicas(trace.arrivals, scenario.tiers[0])[: round(300 / oracle.SLOT_S)]
    replicas = max(1, math.ceil(1.3 * sum(needed) / len(needed)))
    return oracle.beginning_with(scenario, replicas)


def _read(path: Path, hours: float, skip_hours: float, fleet: float, seed: int) -> Trace:
    def arrivals(keep: float) -> list[Arrival]:
        read = read_trace(path, seed=seed, keep_ratio=keep, hours=hours, skip_hours=skip_hours)
        return list(read)

    peek = arrivals(PEEK_RATIO)
    keep = 1.0
    if len(peek) > 200:
        needed = _mean_replicas(_trace(path.stem, peek)) / PEEK_RATIO
        keep = min(1.0, fleet / needed)
    found = arrivals(keep)
    if not found:
        raise click.UsageError(f"{path} has no requests in these hours")
    return _trace(path.stem if keep == 1.0 else f"{path.stem} x {keep:.4f}", found)


def _trace(name: str, arrivals: Sequence[Arrival]) -> Trace:
    request = oracle.mean_request(arrivals)
    gpu, slo = LONG if request.input_tokens > LONG_TOKENS else SHORT
    return Trace(name, arrivals, gpu, slo, request)


def _mean_replicas(trace: Trace) -> float:
    tier = TierConfig(name="tier", model=MODEL, concurrency_limit=LIMIT)
    scenario = build_scenario(
        PlaneConfig(tiers=[tier]), Options(gpu=trace.gpu, slo=trace.slo), trace.mean_request
    )
    needed = oracle.needed_replicas(trace.arrivals, scenario.tiers[0])
    return sum(needed) / len(needed)


def _synthetic_day(seed: int) -> Trace:
    """Two hours with the shape of a day: a slow rise and fall, with two bursts."""
    rng = random.Random(f"day {seed}")
    arrivals, at_s = [], 0.0
    while at_s < 7200:
        rate = 3.0 + 2.5 * math.sin(at_s / 7200 * 2 * math.pi - math.pi / 2)
        if 2400 <= at_s < 2520 or 5000 <= at_s < 5200:
            rate *= 2
        at_s += rng.expovariate(rate)
        prompt = min(int(rng.lognormvariate(6.5, 0.7)) + 1, 8000)
        arrivals.append(Arrival(at_s, prompt, min(int(rng.expovariate(1 / 150)) + 1, 4000)))
    return _trace("made-up day", arrivals)
