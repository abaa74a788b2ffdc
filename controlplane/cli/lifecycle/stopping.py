"""Stopping what ``tierplane up`` started, and only that; used by ``up`` at its end and by ``down``."""

from __future__ import annotations

from collections.abc import Callable

from controlplane.cli.lifecycle.progress import ProgressReporter
from controlplane.errors import SetupError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.session import RunRecord

DRAIN_MARGIN_S = 45.0
"""Beside the longest drain that the configuration allows: Serve's own steps and the engines' end."""


class _Impatient(Exception):
    """The user does not wait any longer."""


def stop_plane(
    record: RunRecord,
    voice: ProgressReporter,
    *,
    drain_s: float,
    impatient: Callable[[], bool] = lambda: False,
) -> None:
    """Delete the application (replicas drain), end the controller, then stop Ray if it is ours.

    ``drain_s`` is the longest drain of a tier; ``impatient`` is asked again and again, and True skips what
    is left of the wait. On somebody else's Ray only the application and the controller go. Raises
    SetupError if something could not be stopped; the record stays then.
    """
    if record.ray_address and not impatient():
        try:
            _undeploy(record, voice, drain_s=drain_s, impatient=impatient)
        except SetupError as error:
            if not record.owns_ray:
                raise
            voice.step(f"Ray does not answer, its processes are stopped: {error}")
    stopped = 0
    if record.owns_ray:
        voice.step("stopping Ray")
        stopped = session.stop(record)
    session.record_path().unlink(missing_ok=True)
    what = f"{stopped} processes, none is left" if record.owns_ray else "Ray itself goes on"
    voice.result("stopped", f"Stopped ({what}).", processes=stopped, ray_stopped=record.owns_ray)


def _undeploy(
    record: RunRecord, voice: ProgressReporter, *, drain_s: float, impatient: Callable[[], bool]
) -> None:
    session.authenticate(record)
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from controlplane.ray_cluster import plane

    def waiting() -> None:
        if impatient():
            raise _Impatient

    plane.connect(record.ray_address)
    try:
        voice.step("draining and stopping the tiers")
        if not plane.undeploy(record.applications, limit_s=drain_s + DRAIN_MARGIN_S, on_wait=waiting):
            voice.step("the tiers did not stop in time")
            if not record.owns_ray:
                raise SetupError("Serve did not delete the application in time; see `serve status`")
        plane.stop_controller(record.namespace)
        if record.owns_ray:
            serve.shutdown()  # type: ignore[no-untyped-call]
    except _Impatient:
        voice.step("not waiting any longer")
    except (RayError, RayServeException, TimeoutError) as error:
        raise SetupError(str(error).strip().splitlines()[0]) from error
    finally:
        plane.disconnect()
