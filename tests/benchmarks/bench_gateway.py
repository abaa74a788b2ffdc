"""The gateway beside the engine alone, Serve's ingress, vllm-router and LiteLLM.

All stand in front of simulated engines of the same settings that answer as fast as they can. ``post`` is an
answer of 16 tokens in one piece, ``stream`` is 128 chunks. The paths take turns, in several rounds, so that
what else the machine does falls on all of them; each figure is the median of its rounds. Times are until an
answer is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import click

from controlplane.errors import SetupError
from tests.benchmarks import rivals, wrk
from tests.benchmarks.wrk import STREAM_CHUNKS, Figures, Target
from tests.support.plane import Plane, running

PATHS = ("engine", "gateway", "gateway-serve", "vllm-router", "litellm")
OPTIONAL = ("vllm-router", "litellm")
CASES = (("post", 1), ("post", 32), ("stream", 1), ("stream", 32))
SETTINGS: dict[str, object] = {"max_running": 256}
"""Of both engines: no time to first token, none between tokens."""


@click.command(name="gateway")
@click.option("--seconds", default=6.0, show_default=True, help="Load on each path and case, in all rounds.")
@click.option("--rounds", default=3, show_default=True, help="Turns that the paths take.")
@click.option("--paths", default=",".join(PATHS), show_default=True, help="Which to measure, with commas.")
@click.option("--replicas", default=1, show_default=True, help="Gateway replicas.")
@click.option("--vllm-router", "vllm_router", help="Its program, if it is not on PATH.")
@click.option("--litellm", "litellm", help="Its program, if it is not on PATH.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def command(
    seconds: float,
    rounds: int,
    paths: str,
    replicas: int,
    vllm_router: str | None,
    litellm: str | None,
    as_json: bool,
) -> None:
    """Requests/s, streams/s and latency of each way to an engine, side by side."""
    wrk.require_wrk()
    wanted = [path.strip() for path in paths.split(",") if path.strip()]
    unknown = [path for path in wanted if path not in PATHS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there is {', '.join(PATHS)}", param_hint="--paths")
    programs = {"vllm-router": vllm_router, "litellm": litellm}
    found = {name: shutil.which(given or name) for name, given in programs.items()}
    for name, given in programs.items():
        if given and not found[name]:
            raise SetupError(f"{given} can't be run: name the program of {name} with --{name}")
    absent = [name for name in OPTIONAL if name in wanted and not found[name]]
    wanted = [path for path in wanted if path not in absent]
    with _targets(wanted, found, replicas) as (targets, plane):
        for target in targets:
            _check(target)
        what = _processes(plane, replicas)
        rows = measure(targets, seconds, rounds)
    if as_json:
        click.echo(json.dumps({"rows": rows, "gateway": what, "not_installed": absent}))
        return
    _print(rows)
    click.echo(f"\n{what}; wrk with one thread; one process each of the engine, vllm-router and LiteLLM")
    if absent:
        click.echo(f"not installed: {', '.join(absent)}")


def measure(targets: Sequence[Target], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """The rows; every target gets ``seconds`` of load in each case."""
    runs: dict[tuple[str, str, int], list[Figures]] = {}
    for turn in range(rounds):
        for workload, concurrency in CASES:
            # Nobody always comes first.
            for target in (*targets[turn % len(targets) :], *targets[: turn % len(targets)]):
                figures = wrk.run(target, workload, concurrency, seconds / rounds)
                runs.setdefault((target.path, workload, concurrency), []).append(figures)
    return [
        {
            "path": target.path,
            "workload": workload,
            "concurrency": concurrency,
            "per_s": round(median(run.per_s for run in runs[target.path, workload, concurrency]), 1),
            "p50_ms": round(median(run.p50_ms for run in runs[target.path, workload, concurrency]), 3),
            "p99_ms": round(median(run.p99_ms for run in runs[target.path, workload, concurrency]), 3),
        }
        for workload, concurrency in CASES
        for target in targets
    ]


@contextmanager
def _targets(
    wanted: Sequence[str], programs: dict[str, str | None], replicas: int
) -> Iterator[tuple[list[Target], Plane | None]]:
    """What is measured, all of it up at the same time; what is not measured is not started."""
    with ExitStack() as stack:
        found: dict[str, Target] = {}
        plane = None
        if {"gateway", "gateway-serve"} & set(wanted):
            plane = stack.enter_context(running(_plane_args(replicas)))
            model = "only"
            found["gateway"] = Target("gateway", plane.url, model)
            found["gateway-serve"] = Target("gateway-serve", plane.ingress_url, model)
        if set(wanted) - {"gateway", "gateway-serve"}:
            engine = found["engine"] = stack.enter_context(rivals.engine(SETTINGS))
            for name, start in (("vllm-router", rivals.vllm_router), ("litellm", rivals.litellm)):
                program = programs[name]
                if name in wanted and program:
                    found[name] = stack.enter_context(start(program, engine))
        yield [found[path] for path in wanted], plane


def _plane_args(replicas: int) -> dict[str, Any]:
    tier = {
        "name": "only",
        "engine": "simulated",
        "engine_args": {name.replace("_", "-"): value for name, value in SETTINGS.items()},
        "concurrency_limit": 256,
    }
    return {"tiers": [tier], "gateway": {"replicas": replicas}}


def _check(target: Target) -> None:
    """The answers are what is measured: whole, and all of the chunks."""
    post = json.loads(rivals.ask(target, "post"))
    if post["usage"]["completion_tokens"] != wrk.POST_TOKENS:
        raise SetupError(f"{target.path} did not give {wrk.POST_TOKENS} tokens: {post}")
    stream = rivals.ask(target, "stream")
    chunks = stream.count('"content":"') - stream.count('"content":""')
    if chunks < STREAM_CHUNKS or "data: [DONE]" not in stream:
        raise SetupError(f"{target.path} gave {chunks} chunks instead of {STREAM_CHUNKS}")


def _processes(plane: Plane | None, replicas: int) -> str:
    if plane is None:
        return "no gateway"
    count = len(plane.processes("ray::", "gateway"))
    return f"gateway replicas: {replicas}, processes: {count}"


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for workload, concurrency in CASES:
        unit = "streams/s" if workload == "stream" else "requests/s"
        click.echo(f"\n{workload}, {concurrency} at a time")
        click.echo(f"  {'path':<16}{unit:>12}{'p50 ms':>12}{'p99 ms':>12}")
        for row in rows:
            if (row["workload"], row["concurrency"]) == (workload, concurrency):
                figures = f"{row['per_s']:>12,.0f}{row['p50_ms']:>12.2f}{row['p99_ms']:>12.2f}"
                click.echo(f"  {row['path']:<16}{figures}")


if __name__ == "__main__":
    command()
