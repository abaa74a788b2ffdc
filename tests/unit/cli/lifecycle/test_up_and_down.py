import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from controlplane.cli import COMMANDS, main, unwritable
from controlplane.cli.checking.configuration import load_checked
from controlplane.cli.console import age
from controlplane.cli.lifecycle.progress import JsonProgress, LineProgress, LiveProgress
from controlplane.cli.lifecycle.up import (
    START_TRIES,
    Interrupts,
    curl_line,
    deploy_on_own_ray,
    openai_snippet,
    ready_text,
)
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.cluster.status import TierStatus, tier_statuses
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.domain.event import Event
from controlplane.errors import SetupError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.ports import Ports, PortTaken
from controlplane.ray_cluster.session import RunRecord
from tests.support.config_file import write_config
from tests.support.endpoints import make_endpoint
from tests.support.run_record import run_record


@pytest.fixture(autouse=True)
def _own_run_dir(run_dir: Path) -> Path:
    return run_dir


def config(folder: Path, port: int, tier: dict[str, object] | None = None) -> Path:
    args = {"tiers": [tier or {"name": "only", "engine": "simulated"}], "gateway": {"port": port}}
    return write_config(folder, args, http_options={"host": "127.0.0.1", "port": 18000})


def run(*arguments: str) -> Result:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return CliRunner().invoke(main, list(arguments))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_port_that_is_taken_is_named_and_nothing_is_started(tmp_path: Path, run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("up", str(config(tmp_path, port)))
    assert result.exit_code == 1
    assert f"port {port}" in result.output
    assert f"(process {os.getpid()})" in result.output
    assert not (run_dir / "up.json").exists()
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_an_invalid_configuration_exits_with_2_and_lists_every_problem(tmp_path: Path) -> None:
    path = config(tmp_path, 18080, {"name": "Only", "engine": "nonsense"})
    result = run("up", str(path))
    assert result.exit_code == 2
    assert "name" in result.output
    assert "engine" in result.output


@pytest.mark.parametrize("command", ["up", "logs", "down", "monitoring"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_a_message_with_a_remedy(
    command: str, number: int, monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    def full() -> None:
        raise OSError(number, os.strerror(number), str(run_dir / "up.json"))

    monkeypatch.setitem(COMMANDS, command, (f"{__name__}:_full", ""))
    monkeypatch.setattr(sys.modules[__name__], "_full", click.Command(command, callback=full), raising=False)
    result = run(command)
    assert result.exit_code == 1
    assert f"{run_dir / 'up.json'}: {os.strerror(number)}; free space" in result.output


def test_other_errors_of_files_are_not_blamed_on_the_disk() -> None:
    assert unwritable(OSError(errno.EACCES, "no")) == ""


def test_the_first_write_of_up_on_a_full_disk(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        path = config(tmp_path, free.getsockname()[1])
    program = f"from controlplane.cli import main; main(['up', {str(path)!r}, '--no-checks'])"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "free space" in ended.stderr


def test_a_closed_terminal_asks_for_a_stop_in_order() -> None:
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup
        "from controlplane.cli.lifecycle.progress import LineProgress\n"
        "from controlplane.cli.lifecycle.up import Interrupts\n"
        "interrupts = Interrupts(); interrupts.install()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "os.write(2, b'unseen'); LineProgress().step('unseen')\n"
        "os._exit(interrupts.count)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"")


def test_nohup_is_respected() -> None:
    program = (
        "import os, signal\n"
        "from controlplane.cli.lifecycle.up import Interrupts\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "interrupts = Interrupts(); interrupts.install()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "os._exit(interrupts.count)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_progress_that_nobody_can_read_does_not_stop_the_command() -> None:
    program = (
        "import os\n"
        "from controlplane.cli.lifecycle.progress import JsonProgress, LineProgress\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "for progress in (LineProgress(), JsonProgress()):\n"
        "    progress.step('one'); progress.step('two')\n"
        "os._exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 7


def test_up_is_refused_while_a_plane_is_up(tmp_path: Path) -> None:
    run_record().save()
    result = run("up", str(config(tmp_path, 18080)))
    assert result.exit_code == 1
    assert "is already up" in result.output


class Rays:
    """Stands in for Ray: the first ``lost`` starts, or deployments, lose a port."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lost: int, when: str) -> None:
        from controlplane.ray_cluster import plane

        self.lost, self.when = lost, when
        self.ports: list[int] = []
        self.calls: list[str] = []
        monkeypatch.setattr(session, "start", self.start)
        monkeypatch.setattr(session, "check_ports", self.check)
        monkeypatch.setattr(session, "clear", lambda record: self.called("clear", record))
        monkeypatch.setattr(plane, "connect", lambda _: self.called("connect", None))
        monkeypatch.setattr(plane, "disconnect", lambda: self.called("disconnect", None))
        monkeypatch.setattr(plane, "deploy", self.deploy)

    def called(self, name: str, result: Any) -> Any:
        self.calls.append(name)
        return result

    def start(self, record: RunRecord, ports: Ports, *, dashboard: bool) -> RunRecord:
        self.called("start", None)
        self.ports.append(ports.choose("HAProxy's statistics"))
        self.lose("start")
        return record

    def deploy(self, _: Path, __: str) -> None:
        self.called("deploy", None)
        if self.when == "deploy" and self.lost:
            raise SetupError("Serve could not be started: HAProxy crashed")

    def check(self, _: RunRecord, __: Ports, output: str = "") -> None:
        if output:
            self.lose("deploy")

    def lose(self, when: str) -> None:
        if self.when == when and self.lost:
            self.lost -= 1
            raise PortTaken(f"port {self.ports[-1]} (HAProxy's statistics) is taken by x (process 7)")


def deploy(tmp_path: Path, progress: JsonProgress) -> None:
    file = load_checked(str(config(tmp_path, 18080)))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        deploy_on_own_ray(run_record(), file, progress, Interrupts(), dashboard=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("when", ["start", "deploy"])
def test_a_lost_port_is_named_and_ray_starts_again_with_others(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rays = Rays(monkeypatch, lost=1, when=when)
    deploy(tmp_path, JsonProgress())
    first = ["start"] if when == "start" else ["start", "connect", "deploy"]
    assert rays.calls == [*first, "disconnect", "clear", "start", "connect", "deploy"]
    assert len(set(rays.ports)) == 2
    output = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    lost = f"port {rays.ports[0]} (HAProxy's statistics) is taken by x (process 7)"
    assert [text for text in output if "port" in text] == [f"{lost}: starting again with other ports"]


@pytest.mark.parametrize("when", ["start", "deploy"])
def test_the_start_fails_if_ports_are_lost_repeatedly(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rays = Rays(monkeypatch, lost=100, when=when)
    with pytest.raises(PortTaken, match=r"\(HAProxy's statistics\) is taken by x"):
        deploy(tmp_path, JsonProgress())
    assert rays.calls.count("start") == START_TRIES
    assert rays.calls.count("clear") == START_TRIES - 1


def test_a_lost_port_of_the_configuration_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rays = Rays(monkeypatch, lost=0, when="")
    message = "cannot bind socket (Address already in use) for [127.0.0.1:18000]"
    monkeypatch.setattr("controlplane.ray_cluster.plane.deploy", raising(SetupError(message)))
    with pytest.raises(SetupError, match=r"port 18000 is taken by .*: stop it, or set http_options\.port in"):
        deploy(tmp_path, JsonProgress())
    assert rays.calls == ["start", "connect"]


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_down_without_a_plane_needs_no_ray() -> None:
    result = run("down", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output) == {"event": "stopped", "processes": 0, "ray_stopped": False}


def test_down_removes_the_remains_of_a_dead_plane(run_dir: Path) -> None:
    run_record(up_pid=2**22 + 1).save()
    result = run("down")
    assert result.exit_code == 0
    assert "none left" in result.output
    assert not (run_dir / "up.json").exists()


def test_status_without_a_plane_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = run("status")
    assert result.exit_code == 1
    assert "tierplane up" in result.output


def test_the_first_signal_requests_a_stop_and_the_second_to_hurry() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupts = Interrupts()
    try:
        interrupts.install()
        assert not interrupts.stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert (interrupts.stop_requested, interrupts.hurry_requested) == (True, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.hurry_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_commands_of_up_are_never_wrapped_and_it_says_where_the_ui_is_and_how_to_stop() -> None:
    record = run_record(
        gateway_url="http://127.0.0.1:8080",
        ingress_url="http://127.0.0.1:8000",
        dashboard_url="http://h:8265",
    )
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        LiveProgress(console).result("ready", ready_text(record, "balanced", detach=False))
    lines = capture.get().splitlines()
    assert curl_line("http://127.0.0.1:8080", "balanced") in lines
    assert any("http://127.0.0.1:8080/ui" in line for line in lines)
    assert any("Ctrl-C" in line for line in lines)
    assert "tierplane down" in ready_text(record, "balanced", detach=True)


def test_the_examples_are_complete() -> None:
    assert "http://h:1/v1/chat/completions" in curl_line("http://h:1", "balanced")
    body = curl_line("http://h:1", "balanced").partition("-d '")[2].removesuffix("'")
    assert json.loads(body)["model"] == "balanced"
    compile(openai_snippet("http://h:1", "balanced"), "snippet", "exec")


def test_what_up_prints_has_the_key_of_the_machine_where_keys_are_required() -> None:
    line = curl_line("http://h:1", "balanced", "/a run/operator.key")
    assert "-H \"Authorization: Bearer $(cat '/a run/operator.key')\"" in line
    snippet = openai_snippet("http://h:1", "balanced", "/a run/operator.key")
    assert "api_key=open('/a run/operator.key').read().strip()" in snippet
    compile(snippet, "snippet", "exec")


@pytest.mark.parametrize(
    ("s", "text"), [(0, "0 s"), (-3, "0 s"), (59.9, "59 s"), (200, "3 m 20 s"), (18120, "5 h 02 m")]
)
def test_durations_as_text(s: float, text: str) -> None:
    assert age(s) == text


def tiers(phase: str, state: EndpointState = EndpointState.STARTING) -> tuple[TierStatus, ...]:
    endpoint = make_endpoint("only-1", state, tier="only", secret="s3cret", phase=phase)
    return tier_statuses(ClusterSnapshot("e", 1, 0.0, (endpoint,)), [TierSpec("only", "m", "vllm", 1, 1)])


def test_lines_report_only_changes(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineProgress()
    reporter.progress(tiers("loading weights"), 1.0)
    reporter.progress(tiers("loading weights"), 1.5)
    reporter.progress(tiers("", EndpointState.READY), 2.0)
    assert capsys.readouterr().out.splitlines() == [
        "   1.0 s  only           starting   0/1   loading weights",
        "   2.0 s  only           ready      1/1",
    ]


def test_json_lines_report_only_changes_and_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = JsonProgress()
    reporter.step("starting Ray")
    reporter.progress(tiers("loading weights"), 1.0)
    reporter.progress(tiers("loading weights"), 1.5)
    reporter.event(Event(1, 2.0, "ready", "only-1", "generation 1", "only"))
    reporter.result("ready", "as text", url="http://h:1/v1")
    out = capsys.readouterr().out
    output = [json.loads(line) for line in out.splitlines()]
    assert [each["event"] for each in output] == ["step", "progress", "event", "ready"]
    assert output[1]["tiers"][0]["phase"] == "loading weights"
    assert output[3] == {"event": "ready", "url": "http://h:1/v1"}
    assert "s3cret" not in out
