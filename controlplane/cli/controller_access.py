"""Asking the controller of a running plane: which one, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from controlplane.controller.api import Method, P, R
from controlplane.errors import SetupError
from controlplane.ray_cluster import session

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class PlaneAddress:
    """Where a plane is."""

    ray: str
    namespace: str
    url: str = ""
    """The gateway's, if it is known here."""

    def call(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the controller. Raises SetupError if it does not answer."""
        from controlplane.ray_cluster import plane

        return plane.call_controller(self.namespace, self.ray, method, *args, **kwargs)


def plane_options(command: F) -> F:
    """The options that name a plane."""
    options = (
        click.option(
            "--address", help="The Ray to ask; by default the one `tierplane up` started, or RAY_ADDRESS."
        ),
        click.option(
            "--namespace", help="The plane's Ray namespace (controller.namespace of its configuration)."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def connected(address: str | None, namespace: str | None) -> Iterator[PlaneAddress]:
    """This process connected to the plane's Ray. Raises SetupError."""
    record = session.load_record()
    where = address or (record.ray_address if record else "") or os.environ.get("RAY_ADDRESS")
    if not where:
        raise SetupError("no plane runs here: start one with `tierplane up`, or name its Ray with --address")
    if record is not None and where == record.ray_address:
        session.authenticate(record)
    from controlplane.ray_cluster import plane

    plane.connect(where)
    try:
        yield PlaneAddress(
            where,
            namespace or (record.namespace if record else "tierplane"),
            record.gateway_url or record.ingress_url if record else "",
        )
    finally:
        plane.disconnect()
