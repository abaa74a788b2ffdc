"""Load from ``wrk``: POSTs as fast as they are answered, from one thread and so many connections."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

from controlplane.errors import SetupError

STREAM_CHUNKS = 128
POST_TOKENS = 16
LONGEST_S = 30.0
"""Of a run that waits for its first answer, and of an answer."""
MESSAGE = "Say something about the weather in Lisbon."
_SCRIPT = """
wrk.method = "POST"
wrk.body = [==[%s]==]
wrk.headers["content-type"] = "application/json"
%s
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests":%%d,"us":%%d,"p50_us":%%f,"p99_us":%%f,"bad":%%d,"broken":%%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.status, e.connect + e.read + e.write + e.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that answers ``/v1/chat/completions``."""

    path: str
    """Its name in the rows."""
    url: str
    model: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of wrk measured; times until an answer was whole."""

    per_s: float
    p50_ms: float
    p99_ms: float


def body(model: str, workload: str) -> bytes:
    """The request of a workload: ``post`` is one short answer, ``stream`` is 128 chunks."""
    request: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": MESSAGE}],
        "max_tokens": STREAM_CHUNKS if workload == "stream" else POST_TOKENS,
    }
    if workload == "stream":
        request["stream"] = True
    return json.dumps(request).encode()


def require_wrk() -> str:
    """The path of wrk; SetupError if it is not there."""
    found = shutil.which("wrk")
    if found is None:
        raise SetupError(
            "wrk is not installed, and the benchmark's load comes from it: `apt-get install wrk`"
        )
    return found


def run(target: Target, workload: str, concurrency: int, seconds: float) -> Figures:
    """Load ``target`` for ``seconds``, or longer if it is so slow that no response was complete by then.

    Raises SetupError if a response had another status than 200, a connection broke, or no response was
    complete within :data:`LONGEST_S`.
    """
    counted = _load(target, workload, concurrency, seconds)
    while not (counted["requests"] or counted["bad"] or counted["broken"]) and seconds < LONGEST_S:
        seconds = min(4 * seconds, LONGEST_S)
        counted = _load(target, workload, concurrency, seconds)
    if counted["bad"] or counted["broken"] or not counted["requests"]:
        raise SetupError(
            f"{target.path}, {workload}, {concurrency} at a time: {counted['bad']} answers were no 2xx and "
            f"{counted['broken']} connections failed, of {counted['requests']} requests: no figure"
        )
    return Figures(
        counted["requests"] / counted["us"] * 1e6, counted["p50_us"] / 1e3, counted["p99_us"] / 1e3
    )


def _load(target: Target, workload: str, concurrency: int, seconds: float) -> dict[str, float]:
    """What wrk tells of one run."""
    key = f'wrk.headers["authorization"] = "Bearer {target.key}"' if target.key else ""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT % (body(target.model, workload).decode(), key))
        script.flush()
        command = [
            require_wrk(),
            "-t1",
            f"-c{concurrency}",
            f"-d{max(1, round(seconds))}s",
            "--timeout",
            f"{LONGEST_S:g}s",
        ]
        done = subprocess.run(
            [*command, "-s", script.name, f"{target.url}/v1/chat/completions"],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"requests"')]
    if done.returncode != 0 or not lines:
        raise SetupError(f"wrk failed on {target.path}: {(done.stdout + done.stderr).strip()[-500:]}")
    counted: dict[str, float] = json.loads(lines[-1])
    return counted
