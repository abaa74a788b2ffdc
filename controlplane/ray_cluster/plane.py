"""The plane from the command line's side: connect to its Ray, deploy, query the controller, delete."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from controlplane.config.yaml_file import read_yaml
from controlplane.controller.api import ControllerApi, Method, P, R
from controlplane.controller.handle import find_controller
from controlplane.controller.ray_cordons import release_all_gpus
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.event import Event
from controlplane.errors import SetupError
from controlplane.node_agent.ray_actor import stop_node_agents
from controlplane.paths import run_dir
from controlplane.ray_cluster import session
from controlplane.ray_cluster.liveness import answers

SERVE_NAMESPACE = "serve"
CALL_TIMEOUT_S = 10.0

_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


@dataclass(frozen=True, slots=True)
class PlaneView:
    """The state of the plane as the controller reports it, without secrets."""

    snapshot: ClusterSnapshot
    tiers: tuple[TierSpec, ...]
    events: tuple[Event, ...]


def connect(address: str) -> None:
    """Connect this process to a running Ray. Raises SetupError."""
    if ray.is_initialized():
        return
    _check_that_ray_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray warns about the number of CPUs; our users should not see its messages to drivers.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                address=address,
                namespace=SERVE_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
    except (ConnectionError, RuntimeError, RayError, OSError) as error:
        raise SetupError(f"can't connect to Ray at {address}: {str(error).strip()}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # Ray prints events of nodes and actors to standard output, in between our JSON. There is no setting
    # against it; Ray's own debugger switches it off this way.
    ray._private.worker._worker_logs_enabled = False


def _check_that_ray_answers(address: str) -> None:
    """Raise SetupError soon if the head is gone or hangs: Ray itself would try for minutes."""
    record = session.load_record()
    if record is not None and record.ray_address == address and (reason := session.hung(record)):
        raise SetupError(f"{reason}: `tierplane down` ends the plane even so")
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal() and not answers([(host.strip("[]"), int(port))]):
        raise SetupError(
            f"no Ray answers at {address}: start one, or check the address; if it runs, it hangs"
        )


def disconnect() -> None:
    """Disconnect this process from Ray; nothing is stopped."""
    if ray.is_initialized():
        ray.shutdown()


def deploy(config_path: Path, address: str) -> None:
    """Do what ``serve run --non-blocking CONFIG`` does, in this process. Raises SetupError.

    Serve gets a copy of the file, because it reads some words without quotes differently (``no``, ``0755``).
    """
    from ray.serve.scripts import cli as serve_cli

    output = io.StringIO()
    copy = run_dir() / "serve.yaml"
    try:
        copy.unlink(missing_ok=True)
        copy.touch(mode=0o600)
        values = read_yaml(config_path).values
        copy.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"can't write {copy}: {error.strerror}; set TIERPLANE_RUN_DIR") from error
    arguments = ["run", "--non-blocking", "--address", address, str(copy)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            serve_cli.main(args=arguments, standalone_mode=False)
    except SystemExit as error:
        raise SetupError(f"Serve rejected {config_path}:\n{output.getvalue().strip()}") from error
    except RayError as error:
        raise SetupError(f"Serve could not be started:\n{str(error).strip()}") from error


def application_failure(names: tuple[str, ...]) -> str:
    """Serve's own messages about an application that could not be deployed; empty if none failed."""
    try:
        applications = serve.status().applications
    except (RayError, RayServeException):
        return ""  # Serve's controller is restarting; the caller checks again.
    for name in names:
        application = applications.get(name)
        if application is None or application.status not in _FAILED:
            continue
        messages = [application.message, *(item.message for item in application.deployments.values())]
        return "\n".join(dict.fromkeys(message.strip() for message in messages if message.strip()))
    return ""


def undeploy(names: tuple[str, ...], *, limit_s: float) -> bool:
    """Delete the applications and let their replicas drain; False if some are left after ``limit_s``."""
    present = tuple(name for name in names if name in serve.status().applications)
    for name in present:
        serve.delete(name, _blocking=False)
    began_s = time.monotonic()
    while not serve.status().applications.keys().isdisjoint(present):
        if time.monotonic() - began_s > limit_s:
            return False
        time.sleep(0.2)
    return True


def stop_controller(namespace: str) -> None:
    """Stop the controller actor, if there is one, and its node agents, and release its cordons in Ray."""
    controller = find_controller(namespace)
    if controller is not None:
        controller.kill()
    stop_node_agents(namespace)
    release_all_gpus(namespace)


def call_controller(
    namespace: str, address: str, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call a method of the controller. Raises SetupError if there is no controller or it does not answer."""
    try:
        controller = find_controller(namespace)
        if controller is None:
            raise SetupError(
                f"no plane runs in namespace '{namespace}' of the Ray at {address}: name its namespace with "
                "--namespace, or its Ray with --address"
            )
        return controller.get(CALL_TIMEOUT_S, method, *args, **kwargs)
    except (RayError, RuntimeError, TimeoutError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SetupError(f"the controller does not answer ({first}): try again in a moment") from error


def view(namespace: str) -> PlaneView | None:
    """The state of the plane; None if there is no controller or it does not answer (yet)."""
    try:
        return PlaneView(*call_controller(namespace, "", ControllerApi.status))
    except SetupError:
        return None
