from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import pytest

from controlplane.config import RestartConfig, TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines.supervision.process import reserve_port
from controlplane.engines.supervision.status import EngineStatus
from controlplane.engines.supervision.supervisor import EngineSupervisor, log_path
from controlplane.errors import ConfigError, EngineError, EngineStartError, Problem
from tests.support.engines import Recorder, alive, call, local, marked, parent_of, pid_of, supervised
from tests.support.waiting import until

QUICK = RestartConfig(max_restarts=2, window_s=60, backoff_initial_s=0.05, backoff_max_s=0.1)


def tier(**settings: Any) -> TierConfig:
    """A simulated tier that is supervised impatiently; engine arguments go in with ``args``."""
    args = settings.pop("args", {})
    return TierConfig(
        **{
            "name": "small",
            "engine": "simulated",
            "health_interval_s": 0.1,
            "health_timeout_s": 0.4,
            "health_failures": 2,
            "restart": QUICK,
            "engine_args": args,
            **settings,
        }
    )


def knobs(status: EngineStatus, **values: Any) -> None:
    code, _, text = call(status.base_url + "/simulated/knobs", status.secret, values)
    assert code == 200, text


def test_ready_serves_and_stops() -> None:
    with supervised(tier()) as (supervisor, recorder):
        status = supervisor.wait_ready(20)
        assert status.generation == 1
        assert status.restarts == 0
        assert status.base_url == f"http://127.0.0.1:{status.port}"
        assert alive(pid_of(status))
        assert call(status.base_url + "/v1/models")[0] == 401
        assert call(status.base_url + "/v1/models", status.secret)[0] == 200
        assert status.secret not in repr(status)
        supervisor.stop()
        assert supervisor.status.state is EndpointState.STOPPED
    assert recorder.states == [
        EndpointState.STARTING,
        EndpointState.READY,
        EndpointState.DRAINING,
        EndpointState.STOPPED,
    ]
    assert not alive(pid_of(status))
    assert not marked(b"small/r1/")


def test_the_secret_is_on_no_command_line_and_in_no_log() -> None:
    with supervised(tier()) as (supervisor, recorder):
        status = supervisor.wait_ready(20)
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert "controlplane.engines.simulated.server" in listing
        assert status.secret not in listing
        assert status.secret not in str(recorder.events)
        assert status.secret not in log_path("small", "r1").read_text()


def test_progress_is_shown_by_phase() -> None:
    with supervised(tier(args={"load-s": 0.5})) as (supervisor, recorder):
        supervisor.wait_ready(20)
    phases = [status.phase for status in recorder.statuses]
    assert [p for p in dict.fromkeys(phases) if p] == [
        "looking for the model",
        "starting the process",
        "loading weights",
        "ready",
        "stopping",
    ]


def test_a_killed_engine_is_seen_without_a_probe_and_comes_back() -> None:
    with supervised(tier(health_interval_s=60.0)) as (supervisor, recorder):
        before = supervisor.wait_ready(20)
        os.kill(pid_of(before), signal.SIGKILL)
        # Long before the next probe.
        until(lambda: supervisor.status.state is EndpointState.RESTARTING, 5)
        assert supervisor.status.diagnosis == "the simulated engine was killed by SIGKILL"
        after = supervisor.wait_ready(20)
        assert (after.generation, after.restarts, after.diagnosis) == (2, 1, "")
        assert after.secret != before.secret
        assert after.pid != before.pid
        waiting = [s for s in recorder.statuses if s.phase.startswith("starting again")]
        assert waiting
        assert not any(s.base_url or s.secret for s in waiting)


def test_a_hung_engine_is_replaced() -> None:
    with supervised(tier()) as (supervisor, _):
        before = supervisor.wait_ready(20)
        os.kill(pid_of(before), signal.SIGSTOP)
        until(lambda: supervisor.status.state is EndpointState.RESTARTING)
        assert "hung: 2 health probes in a row failed" in supervisor.status.diagnosis
        after = supervisor.wait_ready(20)
        assert after.generation == 2
        assert not alive(pid_of(before))


@pytest.mark.parametrize("fault", [{"health_fails": True}, {"hang": True}])
def test_an_unhealthy_engine_is_replaced(fault: dict[str, bool]) -> None:
    with supervised(tier()) as (supervisor, _):
        knobs(supervisor.wait_ready(20), **fault)
        until(lambda: supervisor.status.generation == 2)
        supervisor.wait_ready(20)


def test_a_probe_that_fails_once_is_forgiven() -> None:
    with supervised(tier(health_failures=1000)) as (supervisor, recorder):
        status = supervisor.wait_ready(20)
        knobs(status, health_fails=True)
        until(lambda: [event for event, _ in recorder.events if event == "probe failed"])
        knobs(status, health_fails=False)
        assert supervisor.status.generation == 1
        assert supervisor.status.state is EndpointState.READY


@pytest.mark.parametrize(("error", "tries"), [(EngineStartError, 1), (EngineError, 3)])
def test_a_launch_that_is_refused_starts_no_process(error: type[EngineError], tries: int) -> None:
    resolved = []

    def refuse(model: str, _progress: Callable[[str], None]) -> str:
        resolved.append(model)
        raise error("the launch does not fit: 20 GiB needed, 16 GiB there")

    with supervised(tier(), resolve=refuse) as (supervisor, recorder):
        with pytest.raises(EngineStartError, match=r"served: .*the launch does not fit: 20 GiB") as caught:
            supervisor.wait_ready(20)
        assert "fetched" not in str(caught.value)
    assert len(resolved) == tries
    assert not [status for status in recorder.statuses if status.pid or status.port]


def test_a_crash_loop_ends_with_a_diagnosis() -> None:
    with supervised(tier(args={"exit-code": 3})) as (supervisor, recorder):
        with pytest.raises(
            EngineStartError,
            match=r"this exit is simulated \(exit_code 3\) \(restarted 2 times in the last 60 s",
        ):
            supervisor.wait_ready(20)
        status = supervisor.status
        assert (status.state, status.generation, status.restarts) == (EndpointState.FAILED, 3, 2)
        assert (status.pid, status.base_url, status.secret) == (None, "", "")
        assert EndpointState.READY not in recorder.states
        assert "this exit is simulated (exit_code 3)" in log_path("small", "r1").read_text()
        delays = [fields["delay_s"] for event, fields in recorder.events if event == "engine restarts"]
        assert delays == [0.05, 0.1]


def test_an_engine_that_crashes_again_and_again_after_it_was_ready_is_given_up_too() -> None:
    with supervised(tier(args={"exit-after-s": 0.1})) as (supervisor, _):
        status = until(
            lambda: supervisor.status if supervisor.status.state is EndpointState.FAILED else None, 20
        )
        assert "exited with code 1" in status.diagnosis


def test_what_failed_starts_again_on_request() -> None:
    with supervised(tier(restart=RestartConfig(max_restarts=0))) as (supervisor, _):
        before = supervisor.wait_ready(20)
        os.kill(pid_of(before), signal.SIGKILL)
        until(lambda: supervisor.status.state is EndpointState.FAILED)
        supervisor.restart("the operator asked")
        until(lambda: supervisor.status.generation == 2)
        assert supervisor.wait_ready(20).pid != before.pid


def test_restart_on_request_does_not_count_as_a_failure() -> None:
    with supervised(tier(restart=RestartConfig(max_restarts=0))) as (supervisor, _):
        before = supervisor.wait_ready(20)
        supervisor.restart("the operator asked")
        until(lambda: supervisor.status.generation == 2)
        assert supervisor.status.diagnosis == "the operator asked"
        supervisor.wait_ready(20)
        assert not alive(pid_of(before))


def test_unknown_settings_are_permanent() -> None:
    with supervised(tier(args={"ttft-seconds": 1})) as (supervisor, _):
        with pytest.raises(EngineStartError, match=r"ttft_seconds.*would not help"):
            supervisor.wait_ready(20)
        assert supervisor.status.generation == 0


def test_a_model_that_is_not_there_is_permanent() -> None:
    def resolve(model: str, progress: Callable[[str], None]) -> str:
        raise ConfigError([Problem("tiers.small.model", "no such model")])

    with supervised(tier(), resolve=resolve) as (supervisor, _):
        with pytest.raises(EngineStartError, match="no such model"):
            supervisor.wait_ready(20)


def test_a_download_shows_its_progress_and_is_tried_again() -> None:
    tries: list[str] = []

    def resolve(model: str, progress: Callable[[str], None]) -> str:
        tries.append(model)
        progress(f"downloading, try {len(tries)}")
        if len(tries) == 1:
            raise OSError("the network is down")
        return model

    with supervised(tier(), resolve=resolve) as (supervisor, recorder):
        supervisor.wait_ready(20)
        assert len(tries) == 2
        assert any(s.phase == "downloading, try 1" for s in recorder.statuses)
        assert any("can't be downloaded: the network is down" in s.diagnosis for s in recorder.statuses)


def test_stop_does_not_wait_for_a_download() -> None:
    release = threading.Event()

    def resolve(model: str, progress: Callable[[str], None]) -> str:
        release.wait(30)
        return model

    with supervised(tier(), resolve=resolve) as (supervisor, _):
        until(lambda: supervisor.status.phase == "looking for the model")
        began_s = time.monotonic()
        supervisor.stop()
        assert time.monotonic() - began_s < 2
        assert supervisor.status.state is EndpointState.STOPPED
    release.set()


def test_an_engine_that_takes_too_long_to_start_is_stopped() -> None:
    late = tier(args={"load-s": 30}, startup_timeout_s=6.0, restart=RestartConfig(max_restarts=0))
    with supervised(late) as (supervisor, _):
        with pytest.raises(EngineStartError, match=r"not ready after 6 s .*loading weights.*refused"):
            supervisor.wait_ready(20)
        assert not marked(b"small/r1/")


def test_wait_ready_names_the_phase_when_time_is_up() -> None:
    with supervised(tier(args={"load-s": 30})) as (supervisor, _):
        until(lambda: supervisor.status.phase == "loading weights")
        with pytest.raises(EngineStartError, match="its phase is: loading weights"):
            supervisor.wait_ready(0.05)


def test_a_taken_port_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two ports are taken by the time the engine binds them."""
    takers: list[socket.socket] = []

    def unlucky(host: str) -> socket.socket | _Held:
        if len(takers) == 2:
            return reserve_port(host)
        taker = socket.create_server((host, 0))
        takers.append(taker)
        return _Held(socket.socket(), taker.getsockname())

    monkeypatch.setattr("controlplane.engines.supervision.generation.reserve_port", unlucky)
    try:
        with supervised(tier(restart=RestartConfig(max_restarts=0))) as (supervisor, recorder):
            status = supervisor.wait_ready(20)
            assert (status.generation, status.restarts) == (3, 0)
            assert [event for event, _ in recorder.events].count("port taken") == 2
    finally:
        for taker in takers:
            taker.close()


class _Held:
    """Looks like a held port and is another's."""

    def __init__(self, held: socket.socket, name: tuple[str, int]) -> None:
        self._held = held
        self._name = name

    def getsockname(self) -> tuple[str, int]:
        return self._name

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_a_reserved_port_goes_to_no_other_process_but_can_be_served() -> None:
    with reserve_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)) as server:
            assert server.getsockname()[1] == port


def test_drain_waits_for_what_runs() -> None:
    with supervised(tier(args={"itl-ms": 20, "tokens": 60})) as (supervisor, recorder):
        status = supervisor.wait_ready(20)
        statuses: list[int] = []
        body = {"messages": [{"role": "user", "content": "hello"}]}
        client = threading.Thread(
            target=lambda: statuses.append(
                call(status.base_url + "/v1/chat/completions", status.secret, body)[0]
            )
        )
        client.start()
        until(lambda: "running{" in _metrics(status) and " 1\n" in _running(status))
        assert supervisor.drain(20) is True
        client.join(5)
        assert statuses == [200]
        assert recorder.states[-2:] == [EndpointState.DRAINING, EndpointState.STOPPED]


def test_drain_gives_up_in_time() -> None:
    with supervised(tier(args={"itl-ms": 1000})) as (supervisor, _):
        status = supervisor.wait_ready(20)
        with socket.create_connection(("127.0.0.1", status.port)) as client:
            body = b'{"messages":[{"role":"user","content":"hello"}]}'
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
                + status.secret.encode()
                + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
                + body
            )
            until(lambda: " 1\n" in _running(status))
            assert supervisor.drain(0.5) is False
        assert not alive(pid_of(status))


def test_drain_also_waits_for_the_callers_own_count() -> None:
    with supervised(tier()) as (supervisor, _):
        supervisor.wait_ready(20)
        left = iter([2, 1, 0])
        assert supervisor.drain(20, lambda: next(left)) is True
        assert next(left, None) is None


def test_an_engine_lost_while_draining_is_not_restarted() -> None:
    with supervised(tier(args={"itl-ms": 1000})) as (supervisor, recorder):
        status = supervisor.wait_ready(20)
        threading.Timer(0.3, os.kill, (pid_of(status), signal.SIGKILL)).start()
        supervisor.drain(5, lambda: 1 if alive(pid_of(status)) else 0)
        assert supervisor.status.generation == 1
        assert EndpointState.RESTARTING not in recorder.states


def test_sigkill_of_the_reaper_is_survived() -> None:
    with supervised(tier()) as (supervisor, _):
        before = supervisor.wait_ready(20)
        os.kill(parent_of(pid_of(before)), signal.SIGKILL)
        until(lambda: supervisor.status.generation == 2)
        supervisor.wait_ready(20)
        assert not alive(pid_of(before))


def test_a_failing_callback_does_not_end_the_engine() -> None:
    recorder = Recorder()

    def broken(status: EngineStatus) -> None:
        raise RuntimeError("the owner's trouble")

    supervisor = EngineSupervisor(
        tier(), replica_id="r1", resolve_model=local, on_change=broken, log=recorder
    )
    supervisor.start()
    try:
        supervisor.wait_ready(20)
    finally:
        supervisor.stop()
    assert ("status callback failed", {"error": 'RuntimeError("the owner\'s trouble")'}) in recorder.events


def test_stop_before_start_and_twice() -> None:
    supervisor = EngineSupervisor(
        tier(), replica_id="r1", resolve_model=local, on_change=lambda _: None, log=Recorder()
    )
    supervisor.stop()
    assert supervisor.status.state is EndpointState.STOPPED
    with supervised(tier()) as (other, _):
        other.stop()
        other.stop()
        with pytest.raises(RuntimeError, match="already been started"):
            other.start()


OWNER = """
import sys, time
from controlplane.config import TierConfig
from controlplane.engines.supervision.supervisor import EngineSupervisor
class Log:
    def info(self, event, **fields): pass
    warning = info
supervisor = EngineSupervisor(TierConfig(name="owned", engine="simulated"), replica_id="x",
    resolve_model=lambda model, progress: model, on_change=lambda status: None, log=Log())
supervisor.start()
print(supervisor.wait_ready(30).pid, flush=True)
time.sleep(60)
"""


def test_sigkill_of_the_supervisors_process_leaves_no_engine() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert alive(pid)
    owner.kill()
    owner.communicate()
    until(lambda: not marked(b"owned/x/"), what="engine and reaper end")
    assert not alive(pid)


def _metrics(status: EngineStatus) -> str:
    return call(status.base_url + "/metrics", status.secret)[2]


def _running(status: EngineStatus) -> str:
    return next(line for line in _metrics(status).splitlines() if "_running{" in line) + "\n"
