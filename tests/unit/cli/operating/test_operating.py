"""cordon, uncordon, drain, restart, events and gpus, with a controller that is played."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.cli.operating import events, gpus, operate
from controlplane.core.domain.event import Event
from controlplane.core.gpus.views import GpuHolder, GpuView
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.core.telemetry.series import Freshness
from controlplane.errors import SetupError
from tests.support.fake_plane import FakePlane

GIB = 1024**3
GPU = "GPU-5c72063a-5b94-2fdb-2918-647d1d1d2fdd"


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], FakePlane]:
    def start(answer: Callable[..., Any]) -> FakePlane:
        plane = FakePlane(answer)
        plane.connect(monkeypatch, operate, events, gpus)
        return plane

    return start


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def gpu(**fields: Any) -> GpuView:
    values: dict[str, Any] = {
        "uuid": GPU,
        "node_id": "49eb0ba7830e90f1d1307154",
        "index": 1,
        "name": "NVIDIA H100 80GB HBM3",
        "state": "healthy",
        "since_unix_s": 0.0,
        "rule": "",
        "reason": "",
        "cordoned": False,
        "node_cordoned": False,
        "condition": "ok",
        "holders": (),
        "freshness": Freshness.FRESH,
        "age_s": 0.4,
        "gpu_ratio": 0.57,
        "memory_used_bytes": 3 * GIB,
        "memory_total_bytes": 80 * GIB,
        "temperature_c": 45.0,
        "power_w": 120.4,
        "sm_clock_mhz": 1200,
        "throttle": (),
        "ecc_corrected": 0,
        "ecc_uncorrected": 0,
        "mig_enabled": False,
        "peers": (),
    }
    return GpuView(**values | fields)


@pytest.mark.parametrize("verb", ["cordon", "drain", "restart", "uncordon"])
def test_an_action_is_sent_to_the_controller_with_its_reason(verb: str, play: Any) -> None:
    plane = play(lambda *_: ActionResponse(ActionOutcome.DONE, f"GPU {GPU}: {verb}ed", (GPU,)))
    done = run(verb, "GPU-5c72", "--reason", "fan is loud")
    assert done.exit_code == 0
    assert done.output == f"GPU {GPU}: {verb}ed\n"
    assert plane.calls == [(verb, "GPU-5c72", "fan is loud")]


@pytest.mark.parametrize("verb", ["cordon", "drain", "restart"])
def test_taking_something_out_of_use_needs_a_reason(verb: str, play: Any) -> None:
    plane = play(lambda *_: None)
    done = run(verb, "GPU-5c72")
    assert done.exit_code == 2
    assert "--reason" in done.output
    assert not plane.calls


def test_an_unnecessary_action_is_no_error(play: Any) -> None:
    play(lambda *_: ActionResponse(ActionOutcome.UNCHANGED, "it was so already", (GPU,)))
    done = run("cordon", GPU, "--reason", "again")
    assert done.exit_code == 0
    assert done.output == f"nothing to do: {GPU}: it was so already\n"


@pytest.mark.parametrize("outcome", [ActionOutcome.UNKNOWN, ActionOutcome.REFUSED])
def test_a_refused_action_exits_with_1_and_its_reason(outcome: ActionOutcome, play: Any) -> None:
    play(lambda *_: ActionResponse(outcome, "there is no GPU, node, tier or endpoint named 'x'"))
    done = run("drain", "x", "--reason", "y")
    assert done.exit_code == 1
    assert "Error: there is no GPU" in done.output
    done = run("drain", "x", "--reason", "y", "--json")
    assert done.exit_code == 1
    assert json.loads(done.output)["outcome"] == outcome.value


def test_without_a_plane_the_error_names_the_remedy(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for arguments in (["gpus"], ["events"], ["cordon", "x", "--reason", "y"], ["status"]):
        done = run(*arguments)
        assert done.exit_code == 1
        assert "tierplane up" in done.output


def test_gpus_as_a_table(play: Any) -> None:
    play(
        lambda *_: (
            gpu(holders=(GpuHolder("fast-a", 500, 38 * GIB), GpuHolder("fast-b", 250, 0))),
            gpu(uuid="GPU-2", index=2, state="draining", rule="xid", reason="XID 79", gpu_ratio=None),
            gpu(uuid="GPU-3", index=0, node_id="other", node_cordoned=True, temperature_c=None),
        )
    )
    done = run("gpus")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "fast-a (0.5, 38.0 GiB), fast-b (0.25)" in lines[1]
    assert "57%" in lines[1]
    assert "3.0 of 80 GiB" in lines[1]
    assert "draining" in lines[2]
    assert " - " in lines[2]
    assert "cordoned" in lines[3]
    assert lines[4].startswith("GPU-2: draining for ")
    assert lines[4].endswith("(xid): XID 79")
    play(lambda *_: ())
    assert run("gpus").output == "No node reports a GPU.\n"


def test_gpus_as_json(play: Any) -> None:
    play(lambda *_: (gpu(holders=(GpuHolder("fast-a", 1000, 0),)),))
    [one] = json.loads(run("gpus", "--json").output)["gpus"]
    assert one["uuid"] == GPU
    assert one["holders"] == [{"endpoint_id": "fast-a", "milli": 1000, "memory_bytes": 0}]


class Log:
    """An audit log that grows while it is followed, and a controller that is away now and then."""

    def __init__(self, end_after: int) -> None:
        self._events = [Event(n, 1000.0 + n, "ready", f"fast-{n}", "why", "fast") for n in range(1, 4)]
        self._asked = 0
        self._end_after = end_after

    def __call__(self, method: str, after: int, limit: int) -> tuple[Event, ...]:
        assert method == "events"
        self._asked += 1
        if after < 0:
            return tuple(self._events[-limit:])
        if self._asked >= self._end_after:
            raise KeyboardInterrupt
        if self._asked % 2:
            raise SetupError("the controller does not answer")
        number = self._events[-1].number + 1
        self._events.append(Event(number, 1000.0, "cordon", GPU, "loud", actor="operator"))
        return tuple(event for event in self._events if event.number > after)


def test_each_event_is_printed_once_and_in_order_even_if_the_controller_restarts(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "POLL_S", 0.0)
    play(Log(end_after=9))
    lines = [json.loads(line) for line in run("events", "--json", "-n", "2", "--follow").output.splitlines()]
    assert [line["number"] for line in lines] == [2, 3, 4, 5, 6]
    assert lines[-1]["actor"] == "operator"
    play(Log(end_after=9))
    output = run("events", "-n", "1").output
    assert "ready: why" in output
    assert len(output.splitlines()) == 1


def test_following_ends_if_the_controller_stays_unreachable(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "POLL_S", 0.0)
    monkeypatch.setattr(events, "UNREACHABLE_LIMIT_S", 0.01)

    def answer(method: str, after: int, limit: int) -> tuple[Event, ...]:
        if after < 0:
            return (Event(1, 1.0, "started", "controller", "epoch"),)
        raise SetupError("the controller does not answer")

    play(answer)
    done = run("events", "--follow")
    assert done.exit_code == 1
    assert "does not answer" in done.output
