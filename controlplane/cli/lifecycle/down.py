"""``tierplane down``: stop what ``tierplane up`` started."""

from __future__ import annotations

import os
import signal
import time

import click

from controlplane.cli.lifecycle.progress import ProgressReporter, progress_reporter
from controlplane.cli.lifecycle.stopping import DRAIN_MARGIN_S, stop_plane
from controlplane.config import load_plane
from controlplane.errors import TierplaneError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.session import RunRecord

DEFAULT_DRAIN_S = 60.0


@click.command()
@click.option("--now", is_flag=True, help="Don't wait for requests that are running.")
@click.option("--json", "as_json", is_flag=True, help="Say what is done as JSON lines.")
def command(now: bool, as_json: bool) -> None:
    """Stop what `tierplane up` started, and only that.

    Tiers, gateway, controller, and Ray if it was started too; a Ray that was there before goes on. Running
    requests are waited for.
    """
    speech = progress_reporter(as_json=as_json)
    record = session.load_record()
    if record is None:
        speech.result("stopped", "Nothing to stop: no plane runs here.", processes=0, ray_stopped=False)
        return
    drain_s = drain_limit_s(record)
    if record.up_is_running() and record.up_pid != os.getpid():
        _stop_foreground(record, speech, 0.0 if now else drain_s + 2 * DRAIN_MARGIN_S)
        record = session.load_record()
        if record is None:
            speech.result("stopped", "Stopped.", processes=0, ray_stopped=True)
            return
    stop_plane(record, speech, drain_s=drain_s, impatient=lambda: now)


def drain_limit_s(record: RunRecord) -> float:
    """The longest drain of the tiers in the configuration that was started, if it can still be read."""
    try:
        return max(tier.drain_timeout_s for tier in load_plane(record.config).plane.tiers)
    except (TierplaneError, OSError):
        return DEFAULT_DRAIN_S


def _stop_foreground(record: RunRecord, speech: ProgressReporter, limit_s: float) -> None:
    """Ask the ``tierplane up`` that is in the foreground somewhere to stop, and wait for its end."""
    speech.step(f"asking `tierplane up` (process {record.up_pid}) to stop")
    os.kill(record.up_pid, signal.SIGTERM)
    deadline_s = time.monotonic() + limit_s
    while record.up_is_running() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    if record.up_is_running():
        os.kill(record.up_pid, signal.SIGKILL)
