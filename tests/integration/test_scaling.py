"""Scaling on a real Ray cluster: a load step makes a tier grow and shrink, an idle one sleeps and wakes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.load import Load, generate, question, session
from tests.benchmarks.load_steps import Run, Step, run_steps
from tests.support.plane import TIERPLANE, Plane, running
from tests.support.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOKENS = 40
STEADY, SLEEPY = "steady", "sleepy"


def tier(name: str, **more: Any) -> dict[str, Any]:
    """A replica holds a request for 0.9 s: with 4 at once it carries about 4.5 a second."""
    engine = {"itl_ms": 20, "ttft_ms": 50, "tokens": TOKENS}
    return {
        **{"name": name, "engine": "simulated", "engine_args": engine, "concurrency_limit": 4},
        **{"spill": "none", "drain_timeout_s": 10.0, **more},
    }


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    tiers = [
        tier(
            SLEEPY,
            replicas=0,
            scaling={"min_replicas": 0, "max_replicas": 1, "hold_s": 2.0, "idle_to_zero_s": 4.0},
        ),
        tier(STEADY, scaling={"min_replicas": 1, "max_replicas": 4, "hold_s": 6.0}),
    ]
    scaling = {"mode": "apply", "tick_s": 1.0, "advice_interval_s": 5.0, "window_s": 10.0}
    controller = {"heartbeat_s": 0.5, "scaling": scaling}
    with running({"tiers": tiers, "controller": controller}, dashboard=True) as started:
        yield started


def program(plane: Plane, *words: str) -> Any:
    env = {**os.environ, "TIERPLANE_RUN_DIR": str(plane.folder / "run")}
    done = subprocess.run(
        [*TIERPLANE, *words, "--json"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def on_the_dashboard(plane: Plane, deployment: str) -> dict[str, Any]:
    """What Ray's dashboard knows of a deployment."""
    record = json.loads((plane.folder / "run" / "up.json").read_text())
    token = (Path(record["temp_dir"]) / "auth_token").read_text()
    request = urllib.request.Request(
        f"{record['dashboard_url']}/api/serve/applications/", headers={"authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        applications = json.load(answer)["applications"]
    found: dict[str, Any] = applications["bench"]["deployments"][deployment]
    return found


def test_a_load_step_makes_a_tier_grow_and_shrink_and_no_request_fails(plane: Plane) -> None:
    steps = [Step(2.0, 10.0), Step(11.0, 25.0), Step(1.0, 5.0)]
    seen: dict[str, int] = {}

    def shrunk(run: Run) -> bool:
        return run.most() >= 3 and run.looks[-1].living < run.most()

    async def play() -> Run:
        task = asyncio.create_task(run_steps(plane, STEADY, steps, tokens=TOKENS, seed=1, done=shrunk))
        while not task.done():
            replicas = await asyncio.to_thread(on_the_dashboard, plane, STEADY)
            running_now = [each for each in replicas["replicas"] if each["state"] == "RUNNING"]
            seen["most"] = max(seen.get("most", 0), len(running_now))
            await asyncio.wait({task}, timeout=1.0)
        return task.result()

    run = asyncio.run(play())
    fates = Counter(outcome.fate for outcome in run.load.outcomes)
    assert set(fates) == {"ok"}, [o.detail for o in run.load.outcomes if o.fate != "ok"][:3]
    assert run.ready_at(9.0) == 1
    assert run.most() >= 3
    assert shrunk(run), [(round(look.at_s), look.ready) for look in run.looks][::10]
    assert seen["most"] >= 3, "the dashboard shows it"
    scaled = [each for each in events(plane) if each["kind"] == "scaled" and each["subject"] == STEADY]
    assert "requests" in scaled[0]["reason"]
    metrics = plane.text("/metrics")
    assert f'tier="{STEADY}"' in metrics
    assert "tierplane_forecast_requests_per_second{" in metrics


def test_the_report_counts_what_was_asked(plane: Plane) -> None:
    count = plane.total("tierplane_requests_total", outcome={"ok"}, tier={STEADY})
    assert count > 250, "what the tests before have asked"

    def counted() -> Any:
        report = plane.get("/report?window_minutes=10")
        mine = next((each for each in report["tiers"] if each["tier"] == STEADY), None)
        return report if mine and mine["requests"] == mine["judged"] == count else None

    report = until(counted, 30, f"the samples of {count:g} requests")
    steady = next(each for each in report["tiers"] if each["tier"] == STEADY)
    assert steady["errors"] == 0
    assert 500 < steady["latency_mean_ms"] < steady["latency_max_ms"]
    mine = [each for each in report["endpoints"] if each["tier"] == STEADY]
    assert len(mine) >= 3
    served = sum(each["requests"] for each in mine)
    assert served == steady["requests"], "what ended on a replica in its last moments is counted, too"
    assert any(track["points"] for track in report["tracks"])
    printed = program(plane, "report", "--window", "10")
    assert printed["tiers"][1]["requests"] == count


def events(plane: Plane) -> list[dict[str, Any]]:
    env = {**os.environ, "TIERPLANE_RUN_DIR": str(plane.folder / "run")}
    done = subprocess.run(
        [*TIERPLANE, "events", "-n", "1000", "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_idle_tier_sleeps_and_a_request_that_waits_wakes_it(plane: Plane) -> None:
    assert not plane.endpoints(SLEEPY)
    assert plane.get("/health")["tiers"][SLEEPY]["status"] == "idle"
    load = Load()

    async def ask() -> None:
        async with session() as http:
            ends_s = asyncio.get_running_loop().time() + 0.3
            one = question(0, "stream", SLEEPY, TOKENS, TOKENS)
            await generate(load, http, plane.url, 10.0, lambda _: (one, {}), lambda: ends_s)

    for _ in range(2):
        asyncio.run(ask())
        assert {outcome.fate for outcome in load.outcomes} == {"ok"}
        until(lambda: not plane.endpoints(SLEEPY), 90, "the tier's sleep")


def test_a_number_set_by_hand_wins_and_advice_is_shown(plane: Plane) -> None:
    answer = program(plane, "scale", STEADY, "2", "--for", "1h", "--reason", "a demonstration")
    assert answer["outcome"] == "done"
    until(lambda: len(plane.endpoints(STEADY)) == 2, 60, "two replicas")
    printed = plane.get("/recommendations")
    assert printed["mode"] == "apply"
    steady = next(each for each in printed["tiers"] if each["tier"] == STEADY)
    assert (steady["mode"], steady["target"]) == ("by hand", 2)
    assert program(plane, "recommendations")["tiers"][1]["override"]["reason"] == "a demonstration"
    assert program(plane, "scale", STEADY, "auto")["outcome"] == "done"
    until(lambda: len(plane.endpoints(STEADY)) == 1, 90, "the policy's own number")
