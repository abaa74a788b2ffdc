"""Predicted against measured memory: real vLLM engines on this machine's CPU, one after the other.

Each case starts vLLM's own server, asks its workers for the bytes they hold, reads the KV blocks from
``/metrics`` and the KV tokens from ``vllm:cache_config_info``, and stops it. The bundled model brings real
weights (tensor parallel 1 and 3, float32 and bfloat16, two KV sizes); the family cases start shortened
versions of other architectures with ``--load-format dummy``, whose sizes are real and whose values are not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from controlplane.core.sizing.cpu_memory import plan_cpu_memory
from controlplane.core.sizing.engine_args import parse_settings
from controlplane.core.sizing.gpu_models import GIB
from controlplane.core.sizing.hf_config import parse_config
from controlplane.models.bundled import resolve
from controlplane.models.catalog import known_models
from controlplane.models.model_config import load_model
from controlplane.planning.cpu_info import packs_16_bit
from controlplane.ray_cluster.ports import free_port
from tests.benchmarks.memory_probe import resident_bytes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "controlplane" / "core" / "sizing" / "memory.md"
MARKS = ("<!-- bench memory: begin -->", "<!-- bench memory: end -->")
START_TIMEOUT_S = 300.0
BUNDLED = "bundled:smollm2-135m"


@dataclass(frozen=True)
class Case:
    """One engine to start."""

    name: str
    tp: int = 1
    dtype: str = "float32"
    kv_gib: int = 1
    args: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of a family case; empty for the bundled model."""


def cases() -> list[Case]:
    """All cases: the bundled model first, then the families."""
    found = [
        Case(f"smollm2-135m tp={tp} {dtype} kv={kv}GiB", tp, dtype, kv)
        for tp in (1, 3)
        for dtype in ("float32", "bfloat16")
        for kv in (1, 2)
    ]
    shortened: dict[str, dict[str, Any]] = {
        "Qwen/Qwen2.5-0.5B-Instruct": {"num_hidden_layers": 6},
        "Qwen/Qwen3-0.6B": {"num_hidden_layers": 6},
        "google/gemma-2-2b-it": {"num_hidden_layers": 4},
        "microsoft/Phi-3-mini-4k-instruct": {"num_hidden_layers": 2},
        "Qwen/Qwen3-30B-A3B": {"num_hidden_layers": 1},
        "deepseek-ai/DeepSeek-V3": {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "moe_intermediate_size": 256,
            "n_routed_experts": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "quantization_config": None,
        },
    }
    for entry in known_models():
        change = shortened.get(entry["name"])
        if change is None:
            continue
        config = {k: v for k, v in {**entry["config"], **change}.items() if v is not None}
        name = f"{entry['name'].rsplit('/')[-1]}, {config['num_hidden_layers']} layer(s)"
        found.append(
            Case(f"{name}, bfloat16", dtype="bfloat16", args={"max-model-len": "4096"}, config=config)
        )
    return found


@click.command(name="memory")
@click.option("--model", default=BUNDLED, show_default=True, help="The model of the cases with real weights.")
@click.option("--only", default="", metavar="TEXT", help="Only cases whose name contains TEXT.")
@click.option(
    "--rows",
    "rows_file",
    type=click.Path(exists=True),
    help="Compare the measurements that --json printed with new predictions.",
)
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
@click.option("--write", is_flag=True, help="Put the table into controlplane/core/sizing/memory.md.")
def command(model: str, only: str, rows_file: str | None, as_json: bool, write: bool) -> None:
    """Predicted against measured memory of real vLLM engines on CPU."""
    chosen = [case for case in cases() if only in case.name]
    if not chosen:
        raise click.UsageError("no case has that in its name: " + "; ".join(case.name for case in cases()))
    if rows_file:
        rows = with_new_predictions(json.loads(Path(rows_file).read_text(encoding="utf-8"))["rows"])
    else:
        rows = measure(chosen, resolve(model, "vllm", lambda text: click.echo(text, err=True)))
    if as_json:
        click.echo(json.dumps({"rows": rows}, indent=1))
    else:
        click.echo(table(rows))
    if write:
        write_document(rows)
    if any("error" in row for row in rows):
        raise SystemExit(1)


def measure(chosen: list[Case], bundled: str) -> list[dict[str, Any]]:
    """Every case's rows; one that doesn't start becomes a row with its error."""
    rows: list[dict[str, Any]] = []
    for case in chosen:
        began = time.monotonic()
        try:
            rows += run(case, bundled)
        except RuntimeError as error:
            rows.append({"case": case.name, "term": "failed", "error": str(error)})
        click.echo(f"{case.name}: {time.monotonic() - began:.0f} s", err=True)
    return rows


def run(case: Case, bundled: str) -> list[dict[str, Any]]:
    """Start the engine, compare, stop it. RuntimeError with its last lines if it doesn't start."""
    with tempfile.TemporaryDirectory(prefix="tierplane-bench-") as scratch:
        path = bundled
        args = _args(case)
        if case.config:
            path = scratch
            (Path(scratch) / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
            args |= {"load-format": "dummy", "tokenizer": bundled}
        predicted = predict(case)
        with engine(path, args, case, Path(scratch) / "log") as port:
            return compare(case, predicted, port)


@contextmanager
def engine(model: str, args: Mapping[str, str], case: Case, log: Path) -> Iterator[int]:
    """A running vLLM server; yields its port and ends its whole process group."""
    port = free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--model", model]
    argv += ["--worker-extension-cls", "tests.benchmarks.memory_probe.MemoryProbe"]
    for name, value in args.items():
        argv += [f"--{name}", value] if value else [f"--{name}"]
    cores = os.cpu_count() or 1
    bind = "|".join(str(min(rank, cores - 1)) for rank in range(case.tp))
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(case.kv_gib),
        **({"VLLM_CPU_OMP_THREADS_BIND": bind} if case.tp > 1 else {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield port
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    lines = log.read_text(errors="replace").splitlines()
    wrong = [line for line in lines if "Error" in line][-1:] or lines[-3:]
    raise RuntimeError("the engine did not start: " + " / ".join(wrong))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the server, which stops its workers, and kill what remains of its process group after 30 s."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _args(case: Case) -> dict[str, str]:
    return {"dtype": case.dtype, "enforce-eager": "", "tensor-parallel-size": str(case.tp), **case.args}


@dataclass(frozen=True)
class Figure:
    """One term of one case: bytes over all workers, and the number of blocks or tokens if it is a count."""

    size_bytes: float
    count: int | None = None


def predict(case: Case) -> dict[str, Figure]:
    """The prediction of the memory model, by term."""
    settings = parse_settings({k: v or True for k, v in _args(case).items()}, device="cpu")
    spec = parse_config(case.config, case.name) if case.config else load_model(BUNDLED).spec
    plan = plan_cpu_memory(
        spec, settings, kv_cache_bytes=case.kv_gib * GIB, node_bytes=0, packs_16_bit=packs_16_bit()
    )
    by_term = {term.name: term.size_bytes for term in plan.terms}
    rotary = sum(worker.tables_bytes for worker in plan.workers)
    block_bytes = sum(worker.layout.block_bytes for worker in plan.workers)
    per_token = block_bytes / plan.workers[0].layout.block_tokens
    return {
        "weights": Figure(by_term["weights"] - rotary),
        "rotary table": Figure(rotary),
        "packed copies": Figure(by_term["packed copies"]),
        "KV cache": Figure(plan.blocks * block_bytes),
        "KV blocks": Figure(plan.blocks * block_bytes, plan.blocks),
        "KV tokens": Figure(plan.kv_tokens * per_token, plan.kv_tokens),
        "resident set, idle": Figure(plan.total_bytes - by_term["activations"]),
    }


def compare(case: Case, predicted: Mapping[str, Figure], port: int) -> list[dict[str, Any]]:
    """One row per term."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/collective_rpc",
        data=json.dumps({"method": "tierplane_memory"}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        workers: list[dict[str, int]] = json.load(response)["results"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        info = re.search(r"vllm:cache_config_info\{(.*?)\} ", response.read().decode())
    if info is None:
        raise RuntimeError("/metrics has no vllm:cache_config_info")
    reported = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
    blocks, tokens = int(reported["num_gpu_blocks"]), int(reported["kv_cache_size_tokens"])
    totals = {name: sum(worker[name] for worker in workers) for name in workers[0]}
    # Counts become bytes with the predicted size of a block or token, so that errors are those of the counts.
    per_block, per_token = (
        (figure.size_bytes / figure.count if figure.count else 0.0)
        for figure in (predicted["KV blocks"], predicted["KV tokens"])
    )
    measured = {
        "weights": Figure(totals["weights"]),
        "rotary table": Figure(totals["buffers"]),
        "packed copies": Figure(totals["copies"]),
        "KV cache": Figure(totals["kv_cache"]),
        "KV blocks": Figure(blocks * per_block, blocks),
        "KV tokens": Figure(tokens * per_token, tokens),
        "resident set, idle": Figure(totals["resident"] + sum(resident_bytes(pid) for pid in _others(port))),
    }
    return [_row(case.name, term, predicted[term], figure) for term, figure in measured.items()]


def with_new_predictions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier measurements with predictions of the current memory model; rows of unknown cases are
    unchanged."""
    predictions = {case.name: predict(case) for case in cases()}
    found = []
    for row in rows:
        predicted = predictions.get(row["case"], {}).get(row["term"])
        if predicted is None:
            found.append(row)
            continue
        measured = Figure(row["measured_bytes"], row.get("measured_count"))
        found.append(_row(row["case"], row["term"], predicted, measured))
    return found


def _others(port: int) -> list[int]:
    """The engine's processes other than its workers: API server and engine core."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = stat.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            group = os.getpgid(int(stat.parent.name))
        except (OSError, ProcessLookupError):
            continue
        if f"--port {port} " in text:
            leader = group
            found.append(int(stat.parent.name))
            break
    else:
        return []
    for stat in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.getpgid(int(stat.parent.name)) == leader and b"EngineCore" in stat.read_bytes():
                found.append(int(stat.parent.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def _row(case: str, term: str, predicted: Figure, measured: Figure) -> dict[str, Any]:
    expected, actual = predicted.size_bytes, measured.size_bytes
    error = (expected - actual) / actual * 100 if actual else (0.0 if expected == actual else 100.0)
    row = {
        "case": case,
        "term": term,
        "predicted_bytes": round(expected),
        "measured_bytes": round(actual),
        "error_percent": round(error, 3),
    }
    if measured.count is not None:
        row |= {"predicted_count": predicted.count, "measured_count": measured.count}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; blocks and tokens are shown as counts."""
    lines = ["| case | term | predicted | measured | error |", "|---|---|---:|---:|---:|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | failed: {row['error']} | | | |")
            continue
        numbers = [_shown(row, which) for which in ("predicted", "measured")]
        lines.append(
            f"| {row['case']} | {row['term']} | {numbers[0]} | {numbers[1]} | {row['error_percent']:+.2f} % |"
        )
    return "\n".join(lines)


def _shown(row: Mapping[str, Any], which: str) -> str:
    if f"{which}_count" in row:
        return f"{row[f'{which}_count']:,}"
    return f"{row[f'{which}_bytes'] / 2**20:,.1f} MiB"


def write_document(rows: list[dict[str, Any]]) -> None:
    """Replace the table between the marks of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    DOCUMENT.write_text(f"{head}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    command()
