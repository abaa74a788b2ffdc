import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.cli.console import age
from controlplane.cli.lifecycle.progress import JsonProgress, LineProgress
from controlplane.cli.lifecycle.up import Interrupts, curl_line, openai_snippet
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.cluster.status import TierStatus, tier_statuses
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.event import Event
from controlplane.ray_cluster.session import RunRecord


@pytest.fixture(autouse=True)
def _own_run_dir(run_dir: Path) -> Path:
    return run_dir


def config(folder: Path, port: int, tier: dict[str, object] | None = None) -> Path:
    values = {
        "http_options": {"host": "127.0.0.1", "port": 18000},
        "applications": [
            {
                "name": "tierplane",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {
                    "tiers": [tier or {"name": "only", "engine": "simulated"}],
                    "gateway": {"port": port},
                },
            }
        ],
    }
    path = folder / "plane.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: str) -> Result:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return CliRunner().invoke(main, list(arguments))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record(**kwargs: Any) -> RunRecord:
    base = RunRecord(
        plane_id="no-such-plane",
        config="/etc/plane.yaml",
        applications=("tierplane",),
        namespace="tierplane",
        up_pid=os.getpid(),
        up_created_unix_s=psutil.Process().create_time(),
        started_unix_s=1.0,
        owns_ray=True,
    )
    return replace(base, **kwargs)


def test_a_port_that_is_taken_is_named_and_nothing_is_started(tmp_path: Path, run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("up", str(config(tmp_path, port)))
    assert result.exit_code == 1
    assert str(port) in result.output
    assert not (run_dir / "up.json").exists()
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_wrong_configuration_ends_with_2_and_every_problem(tmp_path: Path) -> None:
    path = config(tmp_path, 18080, {"name": "Only", "engine": "nonsense"})
    result = run("up", str(path))
    assert result.exit_code == 2
    assert "name" in result.output
    assert "engine" in result.output


def test_up_beside_one_that_runs_is_refused(tmp_path: Path) -> None:
    record().save()
    result = run("up", str(config(tmp_path, 18080)))
    assert result.exit_code == 1
    assert "is up already" in result.output


def test_down_with_nothing_to_stop_says_so_and_needs_no_ray() -> None:
    result = run("down", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output) == {"event": "stopped", "processes": 0, "ray_stopped": False}


def test_down_clears_what_a_dead_plane_left(run_dir: Path) -> None:
    record(up_pid=2**22 + 1).save()
    result = run("down")
    assert result.exit_code == 0
    assert "none is left" in result.output
    assert not (run_dir / "up.json").exists()


def test_status_without_a_plane_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = run("status")
    assert result.exit_code == 1
    assert "tierplane up" in result.output


def test_the_first_signal_asks_to_stop_and_the_second_to_hurry() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupts = Interrupts()
    try:
        interrupts.install()
        assert not interrupts.asked_to_stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert (interrupts.asked_to_stop, interrupts.asked_to_hurry) == (True, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked_to_hurry
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_examples_are_whole() -> None:
    assert "http://h:1/v1/chat/completions" in curl_line("http://h:1", "balanced")
    body = curl_line("http://h:1", "balanced").partition("-d '")[2].removesuffix("'")
    assert json.loads(body)["model"] == "balanced"
    compile(openai_snippet("http://h:1", "balanced"), "snippet", "exec")


@pytest.mark.parametrize(
    ("s", "text"), [(0, "0 s"), (-3, "0 s"), (59.9, "59 s"), (200, "3 m 20 s"), (18120, "5 h 02 m")]
)
def test_durations_for_people(s: float, text: str) -> None:
    assert age(s) == text


def tiers(phase: str, state: EndpointState = EndpointState.STARTING) -> tuple[TierStatus, ...]:
    endpoint = Endpoint(
        endpoint_id="only-1",
        tier="only",
        model="m",
        engine="vllm",
        base_url="",
        state=state,
        concurrency_limit=1,
        secret="s3cret",
        phase=phase,
    )
    return tier_statuses(ClusterSnapshot("e", 1, 0.0, (endpoint,)), [TierSpec("only", "m", "vllm", 1, 1)])


def test_lines_tell_changes_only(capsys: pytest.CaptureFixture[str]) -> None:
    voice = LineProgress()
    voice.progress(tiers("loading weights"), 1.0)
    voice.progress(tiers("loading weights"), 1.5)
    voice.progress(tiers("", EndpointState.READY), 2.0)
    assert capsys.readouterr().out.splitlines() == [
        "   1.0 s  only           starting   0/1   loading weights",
        "   2.0 s  only           ready      1/1",
    ]


def test_json_lines_tell_changes_only_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    voice = JsonProgress()
    voice.step("starting Ray")
    voice.progress(tiers("loading weights"), 1.0)
    voice.progress(tiers("loading weights"), 1.5)
    voice.event(Event(1, 2.0, "ready", "only-1", "generation 1", "only"))
    voice.result("ready", "for people", url="http://h:1/v1")
    out = capsys.readouterr().out
    said = [json.loads(line) for line in out.splitlines()]
    assert [each["event"] for each in said] == ["step", "progress", "event", "ready"]
    assert said[1]["tiers"][0]["phase"] == "loading weights"
    assert said[3] == {"event": "ready", "url": "http://h:1/v1"}
    assert "s3cret" not in out
