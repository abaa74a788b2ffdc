"""Stops the plane that ``tierplane up`` started, and nothing else; for ``down`` and the end of ``up``."""

from __future__ import annotations

from collections.abc import Callable

from controlplane.cli.lifecycle.progress import ProgressReporter
from controlplane.errors import SetupError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.session import RunRecord

DRAIN_MARGIN_S = 45.0
"""Time beyond the longest drain, for Serve's own steps and for stopping the engines."""


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
            _undeploy(record, reporter, drain_s=drain_s, stop_waiting=stop_waiting)
        except SetupError as error:
            if not record.owns_ray:
                raise
            reporter.step(f"Ray does not answer, stopping its processes: {error}")
    stopped = 0
    if record.owns_ray:
        reporter.step("stopping Ray")
        stopped = session.stop(record)
    session.record_path().unlink(missing_ok=True)
    detail = f"{stopped} processes, none left" if record.owns_ray else "Ray continues to run"
    reporter.result("stopped", f"Stopped ({detail}).", processes=stopped, ray_stopped=record.owns_ray)


def _undeploy(
    record: RunRecord, reporter: ProgressReporter, *, drain_s: float, stop_waiting: Callable[[], bool]
) -> None:
    session.authenticate(record)
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from controlplane.ray_cluster import plane

    def waiting() -> None:
        if stop_waiting():
            raise _WaitSkipped

    plane.connect(record.ray_address)
    try:
        reporter.step("draining and stopping the tiers")
        if not plane.undeploy(record.applications, limit_s=drain_s + DRAIN_MARGIN_S, on_wait=waiting):
            reporter.step("the tiers did not stop in time")
            if not record.owns_ray:
                raise SetupError("Serve did not delete the application in time: see `serve status`")
        plane.stop_controller(record.namespace)
        if record.owns_ray:
            serve.shutdown()  # type: ignore[no-untyped-call]
    except _WaitSkipped:
        reporter.step("not waiting any longer")
    except (RayError, RayServeException, TimeoutError) as error:
        raise SetupError(str(error).strip().splitlines()[0]) from error
    finally:
        plane.disconnect()
