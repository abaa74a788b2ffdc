"""Scaling: SLO attainment against GPU hours, our policy beside HPA, KPA, Serve's own, static and an oracle.

Every policy runs on the same simulated fleet (`tierplane simulate`): one tier of Qwen3-8B, 16 requests at
once, on an L4, or on an H100 where the trace's prompts are long. A trace that would need a much larger fleet
is thinned to about --fleet replicas. Without --trace, a made-up day is used. ``oracle_ratio`` is the GPU
hours over the oracle's; ``better`` names the policies that are better than ours on both axes, with their
target where it is not their own (``kpa@0.5``).
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
from controlplane.simulation.traces import Arrival, read_trace

MODEL = "Qwen/Qwen3-8B"
LIMIT = 16
"""Requests at once on a replica."""
LONG_TOKENS = 4000
"""Traces with longer prompts get the larger GPU and the looser SLO."""
SHORT = ("L4", Slo(4.0, 0.3))
LONG = ("H100-80G", Slo(30.0, 0.5))
OTHER_GOALS = (0.9, 0.95, 0.98, 0.995, 0.999)
"""That our policy is asked for, too, for its frontier."""
_RATIOS = (0.4, 0.5, 0.6, 0.8, 0.9, 1.0)
OTHER_TARGETS = {
    "static": (0.7, 0.8, 0.9, 1.1, 1.25),
    "hpa": (0.5, 0.6, 0.7, 0.9, 0.95),
    "hpa-slots": _RATIOS,
    "kpa": _RATIOS,
    "serve": _RATIOS,
}
"""And what baselines aim at, for theirs: nobody knows beforehand which would have been right for a trace."""
FRAME_RATIO = 3.5
"""Of the fewest GPU hours: as far as the picture goes."""
FRAME_MISSED = 30.0
"""In %."""
PEEK_RATIO = 0.002
"""Share of a trace that is read to see how large a fleet it needs, if it has millions of requests."""
EPSILON = 1e-4
"""Attainments that differ by less are the same."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in memory and what they run on."""

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
    """What ours and the oracle are asked to attain."""
    target: float | None
    """What a baseline aims at."""
    result: SimulationResult
    usual: bool
    """Not only for the frontier."""

    @property
    def name(self) -> str:
        """The policy's, with what it is asked for if that is not as usual."""
        asked = self.goal if self.target is None else self.target
        return self.policy if self.usual else f"{self.policy}@{asked:g}"


@click.command()
@click.option("--trace", "paths", type=click.Path(exists=True, dir_okay=False, path_type=Path), multiple=True)
@click.option("--cold-start-s", "colds", type=click.FloatRange(0), multiple=True, default=(10.0, 60.0, 600.0))
@click.option("--policy", "policies", type=click.Choice(NAMES), multiple=True, help="Default: all.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True)
@click.option("--skip-hours", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option(
    "--fleet", type=click.FloatRange(1), default=8.0, show_default=True, help="Replicas, on average."
)
@click.option("--attainment", type=click.FloatRange(0.5, 1.0), default=0.99, show_default=True)
@click.option(
    "--frontier", is_flag=True, help=f"Ask ours for {OTHER_GOALS}, and baselines with other targets, as well."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw attainment against GPU hours, too."
)
@click.option("--json", "as_json", is_flag=True)
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
    traces = [_read(path, hours, skip_hours, fleet, seed) for path in paths] or [_made_up_day(seed)]
    plan = [*_plan(names, attainment, frontier=frontier)]
    rows: list[dict[str, Any]] = []
    total = len(traces) * len(colds) * len(plan)
    done, started_s = 0, time.monotonic()
    for trace in traces:
        for cold_s in colds:
            runs = []
            for name, goal, target, usual in plan:
                found = _run(trace, cold_s, name, goal, target, seed)
                runs.append(Run(name, goal, target, found, usual))
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
    """Policy, goal, target, and whether it is as usual."""
    for name in names:
        yield name, goal, TARGETS.get(name), True
    for name in names if frontier else ():
        if name == "tierplane":
            yield from ((name, other, None, False) for other in OTHER_GOALS)
        yield from ((name, goal, other, False) for other in OTHER_TARGETS.get(name, ()))


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each cold start, a row for each trace: the further left and down, the better. A line joins
    what one policy does with other goals or targets; the large mark is as usual. What costs or misses very
    much more than others is beyond the frame."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    traces, colds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("trace", "cold_start_s"))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    goal = rows[0]["goal"]
    figure = Figure(figsize=(4 * len(colds), 2.6 * len(traces) + 0.6), layout="constrained")
    axes = figure.subplots(len(traces), len(colds), squeeze=False)
    for line, trace in enumerate(traces):
        for place, cold_s in enumerate(colds):
            axis = axes[line, place]
            shown = [row for row in rows if (row["trace"], row["cold_start_s"]) == (trace, cold_s)]
            for number, (policy, marker) in enumerate(zip(policies, "o^vsDXP*", strict=False)):
                mine = [row for row in shown if row["policy"] == policy]
                mine.sort(key=lambda row: (row["goal"], row["target"] or 0.0))
                points = [(row["gpu_hours"], _missed(row)) for row in mine]
                asked = [(row["goal"], row["target"]) for row in mine]
                ours = policy == "tierplane"
                style: dict[str, Any] = {"color": f"C{number}", "zorder": 3 if ours else 2}
                width = 1.4 if ours else 0.6
                axis.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=width, **style)
                usual = points[asked.index((goal, TARGETS.get(policy)))]
                axis.scatter(*usual, marker=marker, s=50, label=policy, **style)
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
    """In %; at least one in ten thousand, for a logarithmic axis."""
    return max(100 * (1 - float(row["slo_attainment"])), 0.01)


def _rows(trace: Trace, cold_s: float, runs: Sequence[Run]) -> Iterable[dict[str, Any]]:
    usual = {run.policy: run.result for run in runs if run.usual}
    best, ours = usual.get("oracle"), usual.get("tierplane")
    others = [run for run in runs if run.policy not in ("tierplane", "oracle")]
    for run in runs:
        better = ""
        if run.policy == "tierplane":
            better = " ".join(other.name for other in others if _beats(other.result, run.result))
        elif ours is not None and run.policy != "oracle" and _beats(ours, run.result):
            better = "tierplane"
        yield {
            "trace": trace.name,
            "cold_start_s": cold_s,
            "policy": run.policy,
            "goal": run.goal,
            "target": run.target,
            "slo_attainment": round(run.result.attainment, 5),
            "gpu_hours": round(run.result.gpu_hours, 3),
            "oracle_ratio": round(run.result.gpu_hours / best.gpu_hours, 3) if best else None,
            "requests": run.result.requests,
            "better": better,
        }


def _beats(one: SimulationResult, other: SimulationResult) -> bool:
    """Is ``one`` at least as good on both axes and better on one?"""
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
    # A fleet that was there before the trace began: what the first five minutes need, and a third more.
    needed = oracle.needed_replicas(trace.arrivals, scenario.tiers[0])[: round(300 / oracle.SLOT_S)]
    begun = max(1, math.ceil(1.3 * sum(needed) / len(needed)))
    return oracle.beginning_with(scenario, begun)


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


def _made_up_day(seed: int) -> Trace:
    """Two hours in which a day's shape passes: a slow rise and fall, with two bursts."""
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
