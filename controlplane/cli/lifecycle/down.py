"""``tierplane down``: stop what ``tierplane up`` started."""

from __future__ import annotations

import os
import signal
import time

import click

from controlplane.cli.lifecycle.progress import ProgressReporter, progress_reporter
from controlplane.cli.lifecycle.stopping import DRAIN_MARGIN_S, SHOWN_S, stop_plane
from controlplane.cli.lifecycle.watched import leave
from controlplane.config import load_plane
from controlplane.errors import TierplaneError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.session import RunRecord

DEFAULT_DRAIN_S = 60.0
HUNG_LIMIT_S = 15.0
"""How long an `up` whose Ray hangs may take to stop before it is killed."""


@click.command()
@click.option("--now", is_flag=True, help="Don't wait for running requests.")
@click.option("--json", "as_json", is_flag=True, help="Report progress as JSON lines.")
def command(now: bool, as_json: bool) -> None:
    """Stop the plane that `tierplane up` started, and nothing else.

    Stops the tiers, the gateway, the controller and, if `tierplane up` started it, Ray. Waits for running
    requests.
    """
    reporter = progress_reporter(as_json=as_json)
    record = session.load_record()
    if record is None:
        reporter.result("stopped", "Nothing to stop: no plane runs here.", processes=0, ray_stopped=False)
        return
    drain_s = drain_limit_s(record)
    if record.up_is_running() and record.up_pid != os.getpid():
        _stop_foreground(record, reporter, 0.0 if now else drain_s + 2 * DRAIN_MARGIN_S)
        record = session.load_record()
        if record is None:
            reporter.result("stopped", "Stopped.", processes=0, ray_stopped=True)
            return
    stop_plane(record, reporter, drain_s=drain_s, stop_waiting=lambda: now)
    leave(0)


def drain_limit_s(record: RunRecord) -> float:
    """The longest drain time-out of the configuration's tiers; a default if the file can't be read."""
    try:
        return max(tier.drain_timeout_s for tier in load_plane(record.config).plane.tiers)
    except (TierplaneError, OSError):
        return DEFAULT_DRAIN_S


def _stop_foreground(record: RunRecord, reporter: ProgressReporter, limit_s: float) -> None:
    """Ask the ``tierplane up`` that runs in the foreground to stop, wait for it, and kill it if it takes too
    long."""
    reporter.step(f"asking `tierplane up` (process {record.up_pid}) to stop")
    os.kill(record.up_pid, signal.SIGTERM)
    if session.hung(record):
        limit_s = min(limit_s, HUNG_LIMIT_S)
    deadline_s = time.monotonic() + limit_s
    shown_s = time.monotonic()
    while record.up_is_running() and time.monotonic() < deadline_s:
        if time.monotonic() - shown_s > SHOWN_S:
            shown_s = time.monotonic()
            reporter.step(f"waiting for it to stop, at most {deadline_s - shown_s:.0f} s more")
        time.sleep(0.2)
    if record.up_is_running():
        reporter.step("it did not stop in time and is killed")
        os.kill(record.up_pid, signal.SIGKILL)
