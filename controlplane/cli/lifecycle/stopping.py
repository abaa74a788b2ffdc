"""Stops the plane that ``tierplane up`` started, and nothing else; for ``down`` and the end of ``up``."""

from __future__ import annotations

import time
from collections.abc import Callable

from controlplane.cli.lifecycle.progress import ProgressReporter
from controlplane.cli.lifecycle.watched import abandon, watched
from controlplane.errors import SetupError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.session import RunRecord

DRAIN_MARGIN_S = 45.0
"""Time beyond the longest drain, for Serve's own steps and for stopping the engines."""

STOP_MARGIN_S = 30.0
"""Time beyond that for Serve's own end and the controller's; then Ray counts as hung."""
CHECK_S = 5.0
"""How often, while it waits, ``down`` checks that Ray's main processes answer."""
SHOWN_S = 10.0
"""How often it says what it waits for."""


class _WaitSkipped(Exception):
    """The user does not want to wait any longer."""


def stop_plane(
    record: RunRecord,
    reporter: ProgressReporter,
    *,
    drain_s: float,
    stop_waiting: Callable[[], bool] = lambda: False,
) -> None:
    """Delete the application (replicas drain), stop the controller, then stop Ray if we started it.

    ``drain_s`` is the longest drain of a tier; ``stop_waiting`` is called repeatedly, and the rest of the
    drain is skipped once it returns True. A Ray that we did not start continues to run. Raises SetupError if
    something could not be stopped; the record stays in that case.
    """
    if record.ray_address and not stop_waiting():
        try:
            _check_that_ray_answers(record)
            _undeploy(record, reporter, drain_s=drain_s, stop_waiting=stop_waiting)
        except _WaitSkipped:
            reporter.step("not waiting any longer")
        except SetupError as error:
            if not record.owns_ray:
                raise
            # Its clean-up in this process would wait for the answers of processes that are killed below.
            abandon("Ray")
            reporter.step(f"Ray does not answer, stopping its processes: {error}")
    stopped = 0
    if record.owns_ray:
        reporter.step("stopping Ray")
        stopped = session.stop(record)
    session.record_path().unlink(missing_ok=True)
    detail = f"{stopped} processes, none left" if record.owns_ray else "Ray continues to run"
    reporter.result("stopped", f"Stopped ({detail}).", processes=stopped, ray_stopped=record.owns_ray)


def _check_that_ray_answers(record: RunRecord) -> None:
    hung = session.hung(record)
    if hung:
        raise SetupError(hung)


def _undeploy(
    record: RunRecord, reporter: ProgressReporter, *, drain_s: float, stop_waiting: Callable[[], bool]
) -> None:
    session.authenticate(record)
    limit_s = drain_s + DRAIN_MARGIN_S
    began_s = time.monotonic()
    shown_s = checked_s = began_s

    def watch() -> None:
        nonlocal shown_s, checked_s
        if stop_waiting():
            raise _WaitSkipped
        now_s = time.monotonic()
        if now_s - checked_s > CHECK_S:
            checked_s = now_s
            _check_that_ray_answers(record)
        if now_s - shown_s > SHOWN_S:
            shown_s = now_s
            left_s = max(0.0, began_s + limit_s - now_s)
            reporter.step(
                f"waiting for running requests and for the engines to end, at most {left_s:.0f} s more"
            )

    def work() -> None:
        _delete(record, reporter, limit_s)

    watched(work, watch, limit_s=limit_s + STOP_MARGIN_S)


def _delete(record: RunRecord, reporter: ProgressReporter, limit_s: float) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from controlplane.ray_cluster import plane

    plane.connect(record.ray_address)
    try:
        reporter.step("draining and stopping the tiers")
        if not plane.undeploy(record.applications, limit_s=limit_s):
            reporter.step("the tiers did not stop in time")
            if not record.owns_ray:
                raise SetupError("Serve did not delete the application in time: see `serve status`")
        plane.stop_controller(record.namespace)
        if record.owns_ray:
            serve.shutdown()  # type: ignore[no-untyped-call]
    except (RayError, RayServeException, TimeoutError) as error:
        raise SetupError(str(error).strip().splitlines()[0]) from error
    finally:
        plane.disconnect()
