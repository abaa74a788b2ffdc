"""kill -9 of an engine, until it serves again, beside the start of the same engine by itself."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from time import monotonic
from typing import Any

from controlplane.config import TierConfig
from controlplane.engines import engine_for
from controlplane.engines.base import Launch
from controlplane.models import bundled
from controlplane.ray_cluster.ports import free_port
from tests.support.plane import Plane, running

TIER = "only"
LIMIT_S = 240.0
SECRET = "benchmark"
TIERS: dict[str, dict[str, Any]] = {
    "simulated": {"engine": "simulated", "engine_args": {"load-s": 2.0}},
    "vllm": {
        "engine": "vllm",
        "model": "bundled:smollm2-135m",
        "device": "cpu",
        "engine_args": {"max-model-len": 2048, "max-num-seqs": 8},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    },
}
ROUNDS = {"simulated": 3, "vllm": 1}


def measure(kind: str) -> list[dict[str, Any]]:
    """One row: medians over some rounds, all with one engine at a time."""
    tier = {"name": TIER, **TIERS[kind]}
    bare = [_bare_s(TierConfig(**tier)) for _ in range(ROUNDS[kind])]
    with running({"tiers": [tier]}) as plane:
        again = [_again_s(plane) for _ in range(ROUNDS[kind])]
    bare_s, again_s = statistics.median(bare), statistics.median(again)
    return [
        {
            "engine": kind,
            "rounds": ROUNDS[kind],
            "bare_start_s": round(bare_s, 2),
            "serving_again_s": round(again_s, 2),
            "added_s": round(again_s - bare_s, 2),
        }
    ]


def _bare_s(tier: TierConfig) -> float:
    """From the engine's command line to its first answer, with nothing of ours around it."""
    model = bundled.resolve(tier.model, tier.engine, lambda _: None) if tier.model else ""
    launch = Launch("127.0.0.1", free_port(), SECRET, model)
    command = engine_for(tier).command(tier, launch)
    began_s = monotonic()
    process = subprocess.Popen(
        command.argv,
        env={**os.environ, **command.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://{launch.host}:{launch.port}"
        while not _answers(url, tier.model_id):
            if process.poll() is not None or monotonic() - began_s > LIMIT_S:
                raise RuntimeError("the bare engine does not start")
            time.sleep(0.02)
        return monotonic() - began_s
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _again_s(plane: Plane) -> float:
    """From kill -9 of the engine to the first answer through the gateway."""
    [before] = plane.endpoints(TIER)
    os.kill(before["pid"], signal.SIGKILL)
    began_s = monotonic()
    while monotonic() - began_s < LIMIT_S:
        # The gateway holds the request until an engine is there, so this is when one client is served.
        [now] = plane.endpoints(TIER) or [before]
        if now["generation"] > before["generation"] and _answers(plane.url, TIER):
            return monotonic() - began_s
        time.sleep(0.02)
    raise RuntimeError("the engine did not come back")


def _answers(url: str, model: str) -> bool:
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"authorization": f"Bearer {SECRET}", "content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
