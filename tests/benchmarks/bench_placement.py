"""Placement: allocation on cluster traces, gangs in islands, planning time, distance from the optimum.

The trace table replays pods in the openb format on a fleet, with tierplane's placement and with Random,
BestFit and FGD. FGD gets the distribution of the pods; tierplane learns it from the arrivals.
``limit_percent`` is the allocation at which the mix of pods fills a fleet, for any policy (see
placement/limit.py). ``--published`` adds the figures that Weng et al. (USENIX ATC'23) published for the same
workloads.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from controlplane.cli.console import stdout
from controlplane.errors import SetupError
from tests.benchmarks.placement import gangs, scale
from tests.benchmarks.placement.replay import POLICIES, Run, replay_all, summary
from tests.benchmarks.placement.trace import read_nodes, read_pods

TABLES = ("trace", "gangs", "scale", "optimum")
_PUBLISHED = {"random": "01-Random", "bestfit": "05-BestFit", "fgd": "06-FGD"}
_FILE = click.Path(exists=True, path_type=Path)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


@click.command()
@click.option("--nodes", type=_FILE, help="The fleet: sn, cpu_milli, memory_mib, gpu, model.")
@click.option("--pods", type=_FILE, multiple=True, help="A workload, or a folder of openb_pod_list_*.csv.")
@click.option(
    "--seeds", type=click.IntRange(1), default=10, show_default=True, help="Random orders of each workload."
)
@click.option("--policy", "policies", type=click.Choice(POLICIES), multiple=True, help="Default: all.")
@click.option("--published", type=_FILE, help="The published allocation by arrived load, for comparison.")
@click.option(
    "--table", "tables", type=click.Choice(TABLES), multiple=True, help="Default: all that the files allow."
)
@click.option(
    "--jobs", type=click.IntRange(1), default=_cpus, help="Processes for the traces. Default: one per CPU."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write planning time by fleet size as SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    nodes: Path | None,
    pods: tuple[Path, ...],
    seeds: int,
    policies: tuple[str, ...],
    published: Path | None,
    tables: tuple[str, ...],
    jobs: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Allocation on traces, gangs in islands, planning time, distance from the optimum."""
    chosen = tables or (("trace",) if nodes and pods else TABLES[1:])
    found: dict[str, list[dict[str, object]]] = {}
    notes: dict[str, str] = {}
    if "trace" in chosen:
        if not nodes or not pods:
            raise click.UsageError("the table 'trace' needs --nodes and --pods")
        found["rows"] = _trace(nodes, pods, policies or POLICIES, seeds, jobs, published)
    if "gangs" in chosen:
        found["gangs"] = list(gangs.table(seeds))
    if "scale" in chosen:
        points = list(scale.measure())
        found["scale"] = list(scale.table(points))
        notes["scale"] = scale.chart(points)
        if plot:
            scale.svg(points, plot)
    if "optimum" in chosen:
        found["optimum"] = _optimum(seeds)
    if as_json:
        first = next(iter(found.values()))
        click.echo(json.dumps({"rows": first, **found}))
        return
    for name, rows in found.items():
        _print("trace" if name == "rows" else name, rows, notes.get(name, ""))


def _trace(
    nodes: Path,
    pods: Sequence[Path],
    policies: Sequence[str],
    seeds: int,
    jobs: int,
    published: Path | None,
) -> list[dict[str, object]]:
    fleet = read_nodes(nodes)
    files = [
        file for path in pods for file in (sorted(path.glob("*pod_list_*.csv")) if path.is_dir() else [path])
    ]
    workloads = [read_pods(file) for file in files]
    total = len(workloads) * len(policies) * seeds
    start_s = time.monotonic()
    done: list[Run] = []

    def progress(run: Run) -> None:
        done.append(run)
        click.echo(
            f"[{len(done)}/{total}, {time.monotonic() - start_s:.0f} s] {run.workload} {run.policy} "
            f"seed {run.seed}: {run.allocation_percent:.2f} %",
            err=True,
        )

    rows = list(summary(replay_all(fleet, workloads, policies, seeds, jobs, progress)))
    try:
        from tests.benchmarks.placement.limit import limit_percent
    except ImportError:
        click.echo("no limit_percent: it needs scipy", err=True)
    else:
        limits = {workload.name: round(limit_percent(workload.shapes), 2) for workload in workloads}
        for row in rows:
            row["limit_percent"] = limits[str(row["workload"])]
    if published:
        known = _published(published)
        for row in rows:
            row["published_percent"] = known.get((str(row["workload"]), str(row["policy"])))
    return rows


def _published(path: Path) -> dict[tuple[str, str], float]:
    """(workload, policy) → mean over the published seeds at the last load."""
    values: dict[tuple[str, str], list[float]] = {}
    names = {theirs: ours for ours, theirs in _PUBLISHED.items()}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["sc_policy"] in names:
                key = row["workload"].removeprefix("openb_pod_list_"), names[row["sc_policy"]]
                values.setdefault(key, []).append(float(row["130"]))
    return {key: round(statistics.mean(found), 2) for key, found in values.items()}


def _optimum(seeds: int) -> list[dict[str, object]]:
    try:
        from tests.benchmarks.placement import optimum
    except ImportError as error:
        raise SetupError("the optimum needs scipy: pip install 'scipy>=1.15,<2'") from error
    return list(optimum.table(10 * seeds))


def _print(title: str, rows: Sequence[dict[str, object]], note: str) -> None:
    console = stdout()
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)
    if note:
        console.print(note)
