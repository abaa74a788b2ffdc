"""``tierplane up``: starts Ray and all tiers, and stays in the foreground until Ctrl-C."""

from __future__ import annotations

import fcntl
import importlib
import os
import secrets
import shlex
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TypeVar

import click
import psutil

from controlplane.cli.checking.checks import CheckStatus, run_checks
from controlplane.cli.checking.configuration import load_checked
from controlplane.cli.lifecycle.progress import ProgressReporter, mute, progress_reporter
from controlplane.cli.lifecycle.stopping import stop_plane
from controlplane.cli.lifecycle.watched import leave, watched
from controlplane.config import ServeFile
from controlplane.config.examples import example_path
from controlplane.controller.keys import OPERATOR_KEY_FILE
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.cluster.status import TierStatus, tier_statuses
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.errors import SetupError, TierplaneError
from controlplane.paths import run_dir
from controlplane.ray_cluster import session
from controlplane.ray_cluster.ports import Ports, PortTaken, bind_failures, port_holder, port_is_free
from controlplane.ray_cluster.session import RunRecord

T = TypeVar("T")

DEFAULT_CONFIG = Path("configs/cpu.yaml")
POLL_S = 0.5
SERVE_CHECK_S = 3.0
DIAGNOSIS_WAIT_S = 5.0
HTTP_TIMEOUT_S = 5.0
START_TRIES = 3
"""How often Ray is started, with other ports each time, if another program takes one of its ports."""
START_LIMIT_S = 300.0
"""Connecting to Ray, and the deployment of the application without waiting for it, count as hung after this
long."""
LOST_AFTER_S = 30.0
"""In the foreground: a Ray that does not answer for this long counts as dead."""


_IRRELEVANT_WARNINGS = frozenset({"haproxy", f"port {session.DASHBOARD_PORT}"})
"""Checks whose warnings don't apply to a Ray that is started here, with the right settings and free ports."""


class Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP (the terminal was closed): the first requests a stop, the second a
    stop without waiting."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        """Install the signal handlers; needed again after connecting to Ray, which installs its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as with nohup
            signal.signal(signal.SIGHUP, self._on_hangup)

    def _on_hangup(self, _: int, __: FrameType | None) -> None:
        mute()
        self.count += 1

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        self.count += 1

    @property
    def stop_requested(self) -> bool:
        """Whether to stop."""
        return self.count >= 1

    @property
    def hurry_requested(self) -> bool:
        """Whether to stop without waiting for running requests."""
        return self.count >= 2


class StopRequested(Exception):
    """The user requested a stop."""


@click.command()
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--example", metavar="NAME", help="Start this example (`tierplane init --list`), not CONFIG.")
@click.option(
    "--detach", "-d", is_flag=True, help="Return once all tiers are ready, and leave the plane running."
)
@click.option(
    "--address", help="Deploy to this running Ray instead of starting one; by default RAY_ADDRESS, if set."
)
@click.option("--dashboard", is_flag=True, help="Also start Ray's dashboard (takes 5 s and 0.5 GB more).")
@click.option("--no-checks", is_flag=True, help="Start even if a check of `tierplane doctor` fails.")
@click.option(
    "--timeout", "timeout_s", type=float, help="Give up if not all tiers are ready after this many seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Report progress as JSON lines.")
def command(
    config: Path | None,
    *,
    example: str | None,
    detach: bool,
    address: str | None,
    dashboard: bool,
    no_checks: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Start every tier of CONFIG and the gateway in front of them.

    CONFIG is configs/cpu.yaml by default. Starts its own Ray unless --address or RAY_ADDRESS names one. Stays
    in the foreground until Ctrl-C, and then stops everything that it started; after --detach, `tierplane
    down` does that.
    """
    reporter = progress_reporter(as_json=as_json)
    named = address or os.environ.get("RAY_ADDRESS") or ""
    file = load_checked(str(_chosen(config, example)), here=not named)
    interrupts = Interrupts()
    interrupts.install()
    with _only_one():
        record = _new_record(file, named)
        if record.owns_ray and not no_checks:
            _check_machine(file, reporter)
        elif not port_is_free(file.plane.gateway.port, file.plane.gateway.host):
            raise _port_error(file.plane.gateway.port, "gateway.port", file)
        record.save()
        drain_s = max(tier.drain_timeout_s for tier in file.plane.tiers)
        try:
            record = _start(
                record, file, reporter, interrupts, dashboard=dashboard, timeout_s=timeout_s, detach=detach
            )
            if detach:
                return
            _stay(record, reporter, interrupts)
        except StopRequested:
            reporter.close()
        except BaseException as error:
            reporter.close()
            if isinstance(error, TierplaneError):
                reporter.result("error", f"{error}\n", error=str(error))
            # After a failed start there are no requests worth waiting for.
            _stop(record, reporter, interrupts, drain_s=5.0)
            if isinstance(error, TierplaneError):
                leave(1)
                raise SystemExit(1) from error
            raise
        _stop(record, reporter, interrupts, drain_s=drain_s)
    leave(0)


def _stop(record: RunRecord, reporter: ProgressReporter, interrupts: Interrupts, *, drain_s: float) -> None:
    stop_plane(
        session.load_record() or record,
        reporter,
        drain_s=drain_s,
        stop_waiting=lambda: interrupts.hurry_requested,
    )


def _chosen(config: Path | None, example: str | None) -> Path:
    """The file to start. Raises SetupError if none was named and the checkout's own is not here."""
    if example is not None:
        if config is not None:
            raise click.UsageError("name a file or --example, not both")
        return example_path(example)
    if config is None and not DEFAULT_CONFIG.is_file():
        raise SetupError(
            "no configuration was named: start an example with `tierplane up --example laptop`, or write "
            "your own file with `tierplane init` and start it with `tierplane up tierplane.yaml`"
        )
    return config or DEFAULT_CONFIG


def _new_record(file: ServeFile, address: str) -> RunRecord:
    """The record of this start, after the remains of a dead plane were removed. Raises SetupError if a plane
    is running."""
    old = session.load_record()
    if old is not None:
        alive = old.up_is_running() or (old.owns_ray and session.processes(old.plane_id))
        if alive or not old.owns_ray:
            raise SetupError(f"a plane of {old.config} is already up: `tierplane down` stops it")
        session.stop(old)
        session.record_path().unlink(missing_ok=True)
    gateway, ingress = file.plane.gateway, _reachable_host(file.http_host)
    own_port = f"{'https' if gateway.tls else 'http'}://{_reachable_host(gateway.host)}:{gateway.port}"
    applications = file.raw.get("applications") or []
    return RunRecord(
        plane_id=secrets.token_hex(8),
        config=str(file.path.resolve()),
        applications=tuple(str(each.get("name", "default")) for each in applications),
        namespace=file.plane.controller.namespace,
        up_pid=os.getpid(),
        up_created_unix_s=psutil.Process().create_time(),
        started_unix_s=time.time(),
        owns_ray=not address,
        ray_address=address,
        gateway_url=own_port if gateway.port else "",
        ingress_url=f"http://{ingress}:{file.http_port}{(file.route_prefix or '/').rstrip('/')}",
    )


def _start(
    record: RunRecord,
    file: ServeFile,
    reporter: ProgressReporter,
    interrupts: Interrupts,
    *,
    dashboard: bool,
    timeout_s: float | None,
    detach: bool,
) -> RunRecord:
    """Start Ray, deploy the application and wait for every tier. Raises TierplaneError or StopRequested."""
    began_s = time.monotonic()
    if record.owns_ray:
        record = session.prepare(record)
        session.authenticate(record)
        record = deploy_on_own_ray(record, file, reporter, interrupts, dashboard=dashboard)
    else:
        _check(interrupts)
        _deploy(record, file, reporter, interrupts)
    _wait_for_tiers(record, file, reporter, interrupts, began_s=began_s, timeout_s=timeout_s)
    ready_s = time.monotonic() - began_s
    record = replace(record, ready_unix_s=time.time())
    record.save()
    _report_ready(record, file, reporter, ready_s, detach=detach)
    return record


def deploy_on_own_ray(
    record: RunRecord, file: ServeFile, reporter: ProgressReporter, interrupts: Interrupts, *, dashboard: bool
) -> RunRecord:
    """Start Ray and deploy; start again with other ports if another program takes one before it is bound."""
    for tries_left in reversed(range(START_TRIES)):
        reporter.step("starting Ray")
        with Ports() as ports:
            try:
                starting = ThreadPoolExecutor(1).submit(session.start, record, ports, dashboard=dashboard)
                # Takes seconds, which would add to the time of Ray's start otherwise.
                plane = importlib.import_module("controlplane.ray_cluster.plane")
                record = _watched(interrupts, starting.result, START_LIMIT_S)
                _check(interrupts)
                try:
                    _deploy(record, file, reporter, interrupts)
                except SetupError as error:
                    session.check_ports(record, ports, str(error))
                    raise
                session.check_ports(record, ports)
                return record
            except PortTaken as error:
                if not tries_left:
                    raise
                reporter.step(f"{error}: starting again with other ports")
                plane.disconnect()
                interrupts.install()
                record = session.clear(record)
                _check(interrupts)
    raise AssertionError("the last attempt returns or raises")


def _deploy(record: RunRecord, file: ServeFile, reporter: ProgressReporter, interrupts: Interrupts) -> None:
    """Connect to Ray and deploy the file. Raises SetupError, which names the process that has a port of the
    file."""
    from controlplane.ray_cluster import plane

    _watched(interrupts, lambda: plane.connect(record.ray_address), START_LIMIT_S)
    interrupts.install()
    if not record.owns_ray:
        _watched(interrupts, lambda: _check_no_other_applications(record), LOST_AFTER_S)
    reporter.step(f"deploying {file.application}")
    try:
        _watched(interrupts, lambda: plane.deploy(Path(record.config), record.ray_address), START_LIMIT_S)
    except SetupError as error:
        if record.owns_ray and file.http_port in bind_failures(str(error)):
            raise _port_error(file.http_port, "http_options.port", file) from error
        raise
    interrupts.install()
    _check(interrupts)


def _watched(interrupts: Interrupts, work: Callable[[], T], limit_s: float) -> T:
    """Call Ray. Raises StopRequested as soon as the user requests a stop, whatever Ray does, and SetupError
    after ``limit_s``."""
    return watched(work, lambda: _check(interrupts), limit_s=limit_s)


def _port_error(port: int, setting: str, file: ServeFile) -> SetupError:
    return SetupError(
        f"port {port} is taken by {port_holder(port)}: stop it, or set {setting} in {file.path}"
    )


def _wait_for_tiers(
    record: RunRecord,
    file: ServeFile,
    reporter: ProgressReporter,
    interrupts: Interrupts,
    *,
    began_s: float,
    timeout_s: float | None,
) -> None:
    from controlplane.planning.tier_specs import tier_specs
    from controlplane.ray_cluster import plane

    specs = tier_specs(file.plane)
    snapshot = ClusterSnapshot("", 0, 0.0)
    checked_s = 0.0
    # Serve's ingress is asked where the gateway's own port may want a client's certificate.
    url = record.ingress_url if file.plane.gateway.tls else record.gateway_url or record.ingress_url
    while True:
        _check(interrupts)
        now_s = time.monotonic()
        view = _watched(interrupts, lambda: plane.view(record.namespace), LOST_AFTER_S)
        snapshot = view.snapshot if view else snapshot
        tiers = tier_statuses(snapshot, specs)
        reporter.progress(tiers, now_s - began_s)
        _raise_if_failed(tiers)
        if snapshot.gateways and all(tier.ready for tier in tiers) and _answers(f"{url}/health/ready"):
            return
        if now_s - checked_s > SERVE_CHECK_S:
            checked_s = now_s
            failure = _watched(
                interrupts, lambda: plane.application_failure(record.applications), LOST_AFTER_S
            )
            if failure:
                _raise_diagnosis(record, specs)
                raise SetupError(f"Serve could not deploy the application:\n{failure}")
        if timeout_s is not None and now_s - began_s > timeout_s:
            late = ", ".join(tier.name for tier in tiers if not tier.ready) or "the gateway"
            raise SetupError(
                f"not ready after {timeout_s:g} s: {late}; see `tierplane logs`, or raise --timeout"
            )
        time.sleep(POLL_S)


def _raise_if_failed(tiers: Sequence[TierStatus]) -> None:
    for tier in tiers:
        if tier.failed:
            diagnosis = tier.diagnosis or f"see `tierplane logs {tier.name}`"
            raise SetupError(f"tier '{tier.name}' can't be started: {diagnosis}")


def _raise_diagnosis(record: RunRecord, specs: Sequence[TierSpec]) -> None:
    """After Serve has given up: raise the tier's own diagnosis, if the controller gets it in time.

    Serve may notice that a replica has ended before the controller gets the reason, and Serve's own message
    names no cause.
    """
    from controlplane.ray_cluster import plane

    until_s = time.monotonic() + DIAGNOSIS_WAIT_S
    while time.monotonic() < until_s:
        view = plane.view(record.namespace)
        if view is not None:
            _raise_if_failed(tier_statuses(view.snapshot, specs))
        time.sleep(POLL_S)


def _stay(record: RunRecord, reporter: ProgressReporter, interrupts: Interrupts) -> None:
    """Report events until the user requests a stop. Raises StopRequested, or SetupError if Ray is gone."""
    from controlplane.ray_cluster import plane

    view = _watched(interrupts, lambda: plane.view(record.namespace), LOST_AFTER_S)
    seen = (view.snapshot.epoch, view.events[-1].number) if view and view.events else ("", 0)
    answered_s = time.monotonic()
    while True:
        _check(interrupts)
        time.sleep(POLL_S)
        view = _watched(interrupts, lambda: plane.view(record.namespace), LOST_AFTER_S)
        if view is None:
            if time.monotonic() - answered_s > LOST_AFTER_S:
                raise SetupError(
                    f"the controller has not answered for {LOST_AFTER_S:g} s: Ray has ended or hangs"
                )
            continue
        answered_s = time.monotonic()
        for event in view.events:
            if (view.snapshot.epoch, event.number) != seen and (
                view.snapshot.epoch != seen[0] or event.number > seen[1]
            ):
                reporter.event(event)
        if view.events:
            seen = (view.snapshot.epoch, view.events[-1].number)


def _report_ready(
    record: RunRecord, file: ServeFile, reporter: ProgressReporter, ready_s: float, *, detach: bool
) -> None:
    found = session.processes(record.plane_id) if record.owns_ray else []
    memory_bytes = session.memory_bytes(found)
    url = record.gateway_url or record.ingress_url
    tier = file.plane.gateway.default_tier or next(
        (each.name for each in file.plane.tiers if each.name == "balanced"), file.plane.tiers[0].name
    )
    key_file = str(run_dir() / OPERATOR_KEY_FILE) if file.plane.gateway.auth.enabled else ""
    memory = f", {memory_bytes / 2**30:.1f} GiB in {len(found)} processes" if found else ""
    heading = f"All tiers are ready after {ready_s:.0f} s{memory}."
    reporter.result(
        "ready",
        f"{heading}\n\n{ready_text(record, tier, key_file, detach=detach)}",
        seconds=round(ready_s, 1),
        memory_bytes=memory_bytes,
        processes=len(found),
        url=f"{url}/v1",
        ui_url=f"{url}/ui",
        gateway_url=record.gateway_url,
        ingress_url=record.ingress_url,
        dashboard_url=record.dashboard_url,
        curl=curl_line(url, tier, key_file),
        openai=openai_snippet(url, tier, key_file),
    )


def ready_text(record: RunRecord, tier: str, key_file: str = "", *, detach: bool) -> str:
    """Where the plane is, how to send it a request, and how to stop it. ``key_file`` has the key of the
    commands on this machine; empty if no keys are required."""
    url = record.gateway_url or record.ingress_url
    lines = [f"  OpenAI-compatible address  {url}/v1"]
    if record.gateway_url:
        lines.append(f"  the same on Serve's ingress  {record.ingress_url}/v1")
    lines.append(f"  the plane in a browser  {url}/ui")
    if record.dashboard_url:
        token = Path(record.temp_dir) / "auth_token"
        lines.append(f"  Ray's dashboard  {record.dashboard_url} (its token is in {token})")
    lines.append(f"  to stop everything  {'`tierplane down`' if detach else 'Ctrl-C'}")
    if key_file:
        lines.append("  keys for its users  `tierplane keys create --name NAME`")
    return "\n".join([*lines, "", curl_line(url, tier, key_file), "", openai_snippet(url, tier, key_file)])


def curl_line(url: str, model: str, key_file: str = "") -> str:
    """A shell command that sends a request to ``model``, with the key in ``key_file``, if any."""
    key = f' -H "Authorization: Bearer $(cat {shlex.quote(key_file)})"' if key_file else ""
    body = (
        f'{{"model": "{model}", "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    )
    return f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"


def openai_snippet(url: str, model: str, key_file: str = "") -> str:
    """Python code that sends the same request."""
    key = f"open({key_file!r}).read().strip()" if key_file else '"not-needed"'
    return f"""\
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={key})
answer = client.chat.completions.create(
    model="{model}", temperature=0,
    messages=[{{"role": "user", "content": "What is the capital of France?"}}],
)
print(answer.choices[0].message.content)"""


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as response:  # noqa: S310 (always http)
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _check(interrupts: Interrupts) -> None:
    if interrupts.stop_requested:
        raise StopRequested


def _check_machine(file: ServeFile, reporter: ProgressReporter) -> None:
    """Run the checks of `tierplane doctor` and report warnings. Raises SetupError with all failed ones."""
    found = [check for check in run_checks(file) if check.verdict is not CheckStatus.OK]
    failed = [check for check in found if check.verdict is CheckStatus.FAIL]
    if failed:
        lines = [f"  - {check.name}: {check.message} ({check.remedy})" for check in failed]
        raise SetupError(f"this machine can't run {file.path}:\n" + "\n".join(lines))
    for check in found:
        if check.name not in _IRRELEVANT_WARNINGS:
            reporter.step(": ".join(filter(None, (check.name, check.message, check.remedy))))


def _check_no_other_applications(record: RunRecord) -> None:
    """Raise SetupError if Serve runs other applications, because deploying a file deletes them."""
    from ray import serve

    others = [name for name in serve.status().applications if name not in record.applications]
    if others:
        raise SetupError(
            f"Serve on {record.ray_address} runs {', '.join(sorted(others))}, and deploying this file would "
            "delete it: put all applications into one file and use `serve deploy`, or use another Ray"
        )


def _reachable_host(host: str) -> str:
    return "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 (nothing is bound)


@contextmanager
def _only_one() -> Iterator[None]:
    """Hold the lock of the run folder. Raises SetupError if another `tierplane up` has it."""
    with (run_dir() / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError("another `tierplane up` runs: `tierplane down` stops it") from error
        yield
