"""``tierplane simulate``: replays recorded arrivals through the production code on a simulated fleet."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import click

from controlplane.cli.checking.configuration import load_checked
from controlplane.cli.console import stdout
from controlplane.cli.fitting_table import FittingTable
from controlplane.config import PlaneConfig
from controlplane.core.domain.request import Complexity
from controlplane.core.placement.topology import Node
from controlplane.core.recommendations.views import effect_text, outcome_text
from controlplane.errors import SetupError
from controlplane.planning.cluster_file import load_cluster
from controlplane.simulation import oracle
from controlplane.simulation.options import Options
from controlplane.simulation.placement_text import placement_lines
from controlplane.simulation.policies import NAMES, reactive_policy
from controlplane.simulation.results import SimulationResult, hours_since_start
from controlplane.simulation.scenario import Scenario
from controlplane.simulation.scenario_builder import build_scenario
from controlplane.simulation.simulator import Simulator
from controlplane.simulation.trace_rows import Arrival, TimeUnit, TraceReport
from controlplane.simulation.traces import SAMPLE_TRACE, read_trace

_PEEK = 5000
"""The first requests of the trace, from which the mean request is computed."""
_PROGRESS_S = 1.0
_SHOWN = 5
"""How many of the last decisions and recommendations are printed."""


@click.command()
@click.option(
    "--trace",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file with the arrivals, or `sample` for a synthetic hour of agents' requests.",
)
@click.option(
    "--time-unit", type=click.Choice(["s", "ms", "us", "ns"]),
    help="What the numbers in the trace's time field count, if nothing in the file says it.",
)  # fmt: skip
@click.option(
    "--config", required=True, type=click.Path(dir_okay=False), help="The configuration of the fleet."
)
@click.option("--gpu", metavar="NAME", help="The GPU model of vllm tiers; `tierplane fit --gpus` lists them.")
@click.option(
    "--policy", type=click.Choice(NAMES), default="tierplane", show_default=True, help="The scaling policy."
)
@click.option(
    "--cold-start-s", type=click.FloatRange(0), default=60.0, show_default=True,
    help="Time from requesting a replica until it serves.",
)  # fmt: skip
@click.option(
    "--slo-ttft-ms",
    type=click.FloatRange(1),
    help="SLO for time to first token; by default each tier's `slo`.",
)
@click.option(
    "--slo-itl-ms", type=click.FloatRange(0.1), help="SLO for time per token; by default each tier's `slo`."
)
@click.option(
    "--attainment", type=click.FloatRange(0.5, 1.0),
    help="Share of requests that must meet the SLO; by default each tier's `slo`.",
)  # fmt: skip
@click.option(
    "--min-replicas", type=click.IntRange(0), help="Fewest replicas; by default each tier's `scaling`, or 1."
)
@click.option(
    "--max-replicas", type=click.IntRange(1), help="Most replicas; by default each tier's `scaling`, or 64."
)
@click.option(
    "--engine-ratio",
    type=click.FloatRange(0.05, 2.0),
    default=0.8,
    show_default=True,
    help="Speed of engines as a share of the roofline model's.",
)
@click.option(
    "--itl-ms",
    type=click.FloatRange(0.01),
    default=50.0,
    show_default=True,
    help="Time per token of engines that are neither simulated nor on a known GPU.",
)
@click.option(
    "--prefill-tokens-per-s",
    type=click.FloatRange(1),
    default=500.0,
    show_default=True,
    help="Prompt tokens per second of such engines.",
)
@click.option(
    "--cluster",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A cluster file as for `tierplane plan`: replicas are placed on its GPUs.",
)
@click.option("--mtbf-hours", type=click.FloatRange(0.01), help="Mean time between failures of a replica.")
@click.option(
    "--node-mtbf-hours",
    type=click.FloatRange(0.01),
    help="Mean time between failures of a node of the cluster.",
)
@click.option(
    "--node-recovery-s",
    type=click.FloatRange(0),
    default=600.0,
    show_default=True,
    help="Time until a failed node is available again.",
)
@click.option(
    "--cost-per-gpu-hour", type=click.FloatRange(0), default=0.0, show_default=True,
    help="The price of a GPU-hour.",
)  # fmt: skip
@click.option(
    "--mix",
    metavar="SHARES",
    help="Shares of complexities for requests without one, such as simple=6,complex=1.",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the requests that is replayed, drawn at random.",
)
@click.option(
    "--hours", type=click.FloatRange(0, min_open=True),
    help="Length of the part that is replayed; by default all.",
)  # fmt: skip
@click.option(
    "--skip-hours", type=click.FloatRange(0), default=0.0, show_default=True,
    help="Length of the beginning that is left out.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random numbers.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with plots.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write the plots as a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    trace: Path,
    time_unit: TimeUnit | None,
    config: str,
    gpu: str | None,
    policy: str,
    cold_start_s: float,
    slo_ttft_ms: float | None,
    slo_itl_ms: float | None,
    attainment: float | None,
    min_replicas: int | None,
    max_replicas: int | None,
    engine_ratio: float,
    itl_ms: float,
    prefill_tokens_per_s: float,
    cluster: Path | None,
    mtbf_hours: float | None,
    node_mtbf_hours: float | None,
    node_recovery_s: float,
    cost_per_gpu_hour: float,
    mix: str | None,
    keep: float,
    hours: float | None,
    skip_hours: float,
    seed: int,
    html: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    """Replay recorded arrivals on a simulated fleet of CONFIG: SLO attainment, GPU hours, latencies.

    Routing, admission, scaling and recommendations are the production code; engines, GPUs and time are
    simulated. With --cluster the production code also places replicas, on GPUs that the tiers share; a
    replica without room waits. The same seed gives the same output.

    Traces: a CSV or JSON lines with the fields at_s (or timestamp), input_tokens, output_tokens and
    optionally tier, complexity, priority, session; Azure's, BurstGPT's, Mooncake's or Bailian's traces;
    ServeGen's windows; files of `tierplane trace`.
    """
    if min_replicas is not None and max_replicas is not None and min_replicas > max_replicas:
        raise click.UsageError("--min-replicas is above --max-replicas: lower it, or raise --max-replicas")
    if cluster is not None and gpu is not None:
        raise click.UsageError("--gpu can't be combined with --cluster, which has the GPU models: remove one")
    if node_mtbf_hours is not None and cluster is None:
        raise click.UsageError("--node-mtbf-hours needs nodes: set --cluster too")
    plane = load_checked(config).plane
    nodes = load_cluster(cluster).to_nodes() if cluster is not None else None
    plane = _with_slo(plane, slo_ttft_ms, slo_itl_ms, attainment)
    options = Options(
        gpu=gpu,
        engine_ratio=engine_ratio,
        cold_start_s=cold_start_s,
        mtbf_hours=mtbf_hours,
        node_mtbf_hours=node_mtbf_hours,
        node_recovery_s=node_recovery_s,
        cost_per_gpu_hour=cost_per_gpu_hour,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        tick_s=plane.controller.scaling.tick_s,
        itl_s=itl_ms / 1000,
        prefill_tokens_per_s=prefill_tokens_per_s,
        seed=seed,
    )

    shares = _shares(mix)
    trace = _trace_file(trace)
    report = TraceReport()

    def arrivals() -> Iterator[Arrival]:
        nonlocal report
        report = TraceReport()
        read = read_trace(
            trace,
            seed=seed,
            keep_ratio=keep,
            hours=hours,
            skip_hours=skip_hours,
            time_unit=time_unit,
            report=report,
        )
        return _checked(_mixed(read, shares, seed), plane, trace)

    scenario = _scenario(plane, options, arrivals, nodes)
    started_s = time.perf_counter()
    result = _run(scenario, policy, arrivals, _Progress(quiet=as_json))
    took_s = max(time.perf_counter() - started_s, 1e-9)
    if html:
        from controlplane.simulation.plot import write_html

        write_html(result, html)
    if png:
        from controlplane.simulation.plot import write_png

        write_png(result, png)
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        _show(result)
    for line in report.lines():
        click.echo(line, err=True)
    rate = result.requests / took_s
    click.echo(f"{result.requests} requests simulated in {took_s:.1f} s: {rate:.0f} a second", err=True)


def _trace_file(trace: Path) -> Path:
    """The file that --trace names. Raises UsageError."""
    if trace.is_file():
        return trace
    if str(trace) == "sample":
        return SAMPLE_TRACE
    raise click.UsageError(f"--trace: there is no file {trace}; `--trace sample` replays the sample trace")


def _with_slo(
    plane: PlaneConfig, ttft_ms: float | None, itl_ms: float | None, attainment: float | None
) -> PlaneConfig:
    """The plane with the options' values in every tier's SLO."""
    values = {
        "ttft_s": None if ttft_ms is None else ttft_ms / 1000,
        "itl_s": None if itl_ms is None else itl_ms / 1000,
        "attainment": attainment,
    }
    change = {name: value for name, value in values.items() if value is not None}
    if not change:
        return plane
    tiers = [tier.model_copy(update={"slo": tier.slo.model_copy(update=change)}) for tier in plane.tiers]
    return plane.model_copy(update={"tiers": tiers})


def _scenario(
    plane: PlaneConfig,
    options: Options,
    arrivals: Callable[[], Iterator[Arrival]],
    nodes: Sequence[Node] | None,
) -> Scenario:
    first = list(islice(arrivals(), _PEEK))
    if not first:
        raise SetupError("the trace has no requests in the part to replay: change --hours or --skip-hours")
    return build_scenario(plane, options, oracle.mean_request(first), nodes)


def _run(
    scenario: Scenario,
    policy: str,
    arrivals: Callable[[], Iterator[Arrival]],
    progress: _Progress,
) -> SimulationResult:
    if policy in ("static", "oracle"):
        if len(scenario.tiers) > 1:
            raise click.UsageError(f"policy '{policy}' works for one tier: use a configuration with one tier")
        known = list(arrivals())
        if policy == "static":
            return oracle.run_static(scenario, known)
        return oracle.run_oracle(scenario, known, scenario.tiers[0].rule.slo.attainment)
    span_s = 0.0
    for arrival in arrivals():
        span_s = arrival.at_s
        progress.reading(span_s)
    simulator = Simulator(scenario, reactive_policy(policy), span_s=span_s)
    return simulator.run(arrivals(), policy=policy, progress=progress.running(span_s))


class _Progress:
    """Prints progress to standard error, at most one line per second."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._last_s = time.perf_counter()
        self._began_s = self._last_s

    def reading(self, at_s: float) -> None:
        """Report how far the trace has been read to determine its length."""
        if self._due():
            click.echo(f"reading the trace: {at_s / 3600:.1f} h", err=True)

    def running(self, span_s: float) -> Callable[[float, int], None]:
        """A callback for :meth:`Simulator.run`."""

        def report(at_s: float, requests: int) -> None:
            if self._due():
                share = at_s / span_s if span_s else 1.0
                click.echo(f"{share:.0%}, {at_s / 3600:.1f} h, {requests} requests", err=True)

        return report

    def _due(self) -> bool:
        now_s = time.perf_counter()
        if now_s - self._last_s < _PROGRESS_S or now_s - self._began_s < 2 * _PROGRESS_S:
            return False
        self._last_s = now_s
        return True


def _shares(mix: str | None) -> dict[Complexity, float]:
    """``simple=6,complex=1`` as shares. Raises UsageError."""
    found: dict[Complexity, float] = {}
    for part in (mix or "").split(","):
        if not part.strip():
            continue
        name, _, number = part.partition("=")
        try:
            share = float(number)
            found[Complexity(name.strip())] = share
        except ValueError:
            share = -1.0
        if share < 0 or not math.isfinite(share):
            raise click.UsageError(f"--mix: '{part}' is not a share such as simple=6")
    if mix and not sum(found.values()):
        raise click.UsageError("--mix: all shares are 0, at least one must be positive")
    return found


def _mixed(arrivals: Iterable[Arrival], shares: dict[Complexity, float], seed: int) -> Iterator[Arrival]:
    rng = random.Random(f"mix {seed}")
    names, weights = list(shares), list(shares.values())
    for arrival in arrivals:
        if names and arrival.complexity is None and not arrival.tier:
            yield arrival._replace(complexity=rng.choices(names, weights)[0])
        else:
            yield arrival


def _checked(arrivals: Iterable[Arrival], plane: PlaneConfig, trace: Path) -> Iterator[Arrival]:
    known = {"", *(tier.name for tier in plane.tiers)}
    for arrival in arrivals:
        if arrival.tier not in known:
            names = ", ".join(tier.name for tier in plane.tiers)
            raise SetupError(f"{trace}: tier '{arrival.tier}' is not in the configuration; known: {names}")
        yield arrival


def _show(result: SimulationResult) -> None:
    console = stdout()
    console.print(
        f"policy {result.policy}, seed {result.seed}, {result.simulated_s / 3600:.2f} h: "
        f"{result.attainment:.2%} of {result.requests} requests met the SLO, "
        f"{result.gpu_hours:.2f} GPU hours"
    )
    heads = ("tier", "requests", "SLO met", "replica h", "GPU h", "queue", "first token", "total", "unserved")
    table = FittingTable(*heads, right=heads[1:], leave=("replica h", "GPU h"))
    for tier in result.tiers:
        data = tier.as_json()
        table.add_row(
            data["tier"],
            str(data["requests"]),
            f"{data['slo_attainment']:.2%}",
            f"{data['replica_hours']:.2f}",
            f"{data['gpu_hours']:.2f}",
            *(_span(data[name]) for name in ("queue_ms", "ttft_ms", "latency_ms")),
            str(data["refused"] + data["expired"] + data["lost"]),
        )
    console.print(table)
    console.print("times: 50th and 99th percentile in seconds; unserved: refused, expired or lost")
    for line in placement_lines(result):
        console.print(line, soft_wrap=True)
    if result.decisions:
        console.print(f"scaling decisions: {result.decisions_total}; the last ones:")
    for entry in result.decisions[-_SHOWN:]:
        where = f"{entry.at_s / 3600:.2f} h {entry.tier}: {entry.before} to {entry.target}"
        console.print(f"  {where}, {entry.reason}", soft_wrap=True)
    record = result.record
    mean = "" if record.mean is None else f", mean score {record.mean:.2f}"
    console.print(
        f"{record.given} recommendations, {record.judged} scored, {record.right} right{mean}"
        f"{'; the last ones:' if result.recommendations else ''}"
    )
    for item in result.recommendations[-_SHOWN:]:
        recommendation = item.recommendation
        at = f"{hours_since_start(item):.2f} h {recommendation.instance}"
        where = f"{at}: {recommendation.kind}, {recommendation.suggestion}"
        console.print(f"  {where}: {'; '.join(recommendation.reasons)}", soft_wrap=True)
        sure = f"predicted {effect_text(recommendation.effect)}; {recommendation.confidence:.0%} sure"
        console.print(f"    {sure}; {outcome_text(item) or 'still open'}", soft_wrap=True)


def _span(found: dict[str, float | None]) -> str:
    return "\n".join("-" if found[q] is None else f"{(found[q] or 0.0) / 1000:.2f}" for q in ("p50", "p99"))
