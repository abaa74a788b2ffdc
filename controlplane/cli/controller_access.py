"""Access to the controller of a running plane: the options that select the plane, and the connection."""

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
    """How to reach a running plane."""

    ray: str
    """The address of its Ray."""
    namespace: str
    url: str = ""
    """The address of its gateway; empty if unknown."""

    def call(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the controller. Raises SetupError if it does not answer."""
        from controlplane.ray_cluster import plane

        return plane.call_controller(self.namespace, self.ray, method, *args, **kwargs)


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


@contextmanager
def connected(address: str | None, namespace: str | None) -> Iterator[PlaneAddress]:
    """Connect this process to the plane's Ray for the duration of the block. Raises SetupError."""
    ray = ray_address(address)
    if not ray:
        raise SetupError("no plane runs here: start one with `tierplane up`, or name its Ray with --address")
    with connected_ray(ray):
        record = session.load_record()
        yield PlaneAddress(
            ray,
            namespace or (record.namespace if record else "tierplane"),
            record.gateway_url or record.ingress_url if record else "",
        )
