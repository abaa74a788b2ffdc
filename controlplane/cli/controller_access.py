"""Access to the controller of a running plane: the options that select the plane, and the connection."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from controlplane.cli import plane_http
from controlplane.cli.plane_http import GatewayUnreachable
from controlplane.controller.api import ControllerApi, Method, P, R
from controlplane.controller.stored_plane import STORED_QUERIES, StoredPlane
from controlplane.errors import SetupError
from controlplane.gateway.api.operator_queries import ARGUMENTS
from controlplane.paths import run_dir
from controlplane.ray_cluster import session

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class PlaneAccess:
    """Calls to the controller of a running plane: queries through a gateway, where one answers, else through
    Ray, to which this connects only when it has to (it takes seconds). Use as a context manager.

    What the store of the run folder can answer is answered from it if no plane runs."""

    def __init__(
        self, ray: str, namespace: str, url: str = "", *, ask_gateway: bool = False, ask_store: bool = False
    ) -> None:
        self.url = url
        """The address of the plane's gateway; empty if unknown."""
        self._ray = ray
        self._namespace = namespace
        self._ask_gateway = ask_gateway and bool(url)
        self._open = ExitStack()
        self._connected = False
        self._ask_store = ask_store
        self._store: StoredPlane | None = None

    def __enter__(self) -> PlaneAccess:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def call(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the controller. Raises SetupError if it does not answer."""
        if self._ask_gateway and method.__name__ in ARGUMENTS:
            try:
                return plane_http.query(self.url, method, *args, **kwargs)
            except GatewayUnreachable:
                self._ask_gateway = False
        try:
            return self._call_ray(method, *args, **kwargs)
        except SetupError as error:
            store = self._stored(str(error)) if method.__name__ in STORED_QUERIES else None
            if store is None:
                raise
            return store.call(method, *args, **kwargs)

    @property
    def runs(self) -> bool:
        """Whether there is a plane to call."""
        return bool(self._ray)

    @property
    def store_path(self) -> Path:
        """The store of a plane that does not run here now."""
        return run_dir() / f"controller-{self._namespace}.sqlite"

    def opened(self, manager: AbstractContextManager[T]) -> T:
        """What this context manager returns; it is closed with this object."""
        return self._open.enter_context(manager)

    def tiers(self) -> tuple[str, ...]:
        """The names of the tiers: of the running plane, or else those that have stored figures."""
        try:
            _, specs, _ = self.call(ControllerApi.status)
        except SetupError as error:
            store = self._stored(str(error))
            if store is None:
                raise
            return store.tiers()
        return tuple(spec.name for spec in specs)

    def _call_ray(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._ray:
            raise SetupError(
                "no plane runs here: start one with `tierplane up`, or name its Ray with --address"
            )
        if not self._connected:
            self._open.enter_context(connected_ray(self._ray))
            self._connected = True
        # Only now: it imports Ray, which reads its token when it is imported.
        from controlplane.ray_cluster import plane

        return plane.call_controller(self._namespace, self._ray, method, *args, **kwargs)

    def _stored(self, why: str) -> StoredPlane | None:
        """The store in the run folder, for a plane that does not run; None if there is none."""
        if self._store is None and self._ask_store:
            path = self.store_path
            if path.is_file():
                self._store = self._open.enter_context(StoredPlane(path))
                click.echo(f"{why}. Reading what was stored: {path}", err=True)
        return self._store


def plane_options(command: F) -> F:
    """Adds the options that select a plane to a command."""
    options = (
        click.option(
            "--address",
            help="The plane's Ray; by default the one that `tierplane up` started, or RAY_ADDRESS.",
        ),
        click.option(
            "--namespace", help="The plane's Ray namespace (controller.namespace in its configuration)."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def ray_address(address: str | None) -> str:
    """``address``, or that of the Ray that `tierplane up` started, or RAY_ADDRESS; empty if there is none."""
    record = session.load_record()
    return address or (record.ray_address if record else "") or os.environ.get("RAY_ADDRESS", "")


@contextmanager
def connected_ray(address: str) -> Iterator[None]:
    """Connect this process to a Ray for the duration of the block. Raises SetupError."""
    record = session.load_record()
    if record is not None and address == record.ray_address:
        session.authenticate(record)
    from controlplane.ray_cluster import plane

    plane.connect(address)
    try:
        yield
    finally:
        plane.disconnect()


def connected(address: str | None, namespace: str | None) -> PlaneAccess:
    """Access to the plane that the options select."""
    ray = ray_address(address)
    record = session.load_record()
    return PlaneAccess(
        ray,
        namespace or (record.namespace if record else "tierplane"),
        record.gateway_url or record.ingress_url if record else "",
        ask_store=address is None,
        ask_gateway=record is not None
        and ray == record.ray_address
        and namespace in (None, record.namespace),
    )
