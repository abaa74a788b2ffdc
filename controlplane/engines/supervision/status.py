"""What is known about an engine, as one immutable value that is replaced as a whole."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from controlplane.core.domain.endpoint import EndpointState


class StructuredLog(Protocol):
    """A structured logger: structlog's, or anything with these two."""

    def info(self, event: str, **fields: Any) -> Any:
        """Something happened."""
        ...

    def warning(self, event: str, **fields: Any) -> Any:
        """Something went wrong."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What a supervisor knows about its engine at one moment."""

    state: EndpointState
    phase: str = ""
    """What it is doing while it is not ready, for people."""
    phase_elapsed_s: float = 0.0
    base_url: str = ""
    """In front of ``/v1``, without a trailing slash; empty until there is a port."""
    port: int | None = None
    secret: str = field(default="", repr=False)
    pid: int | None = None
    """The engine's first process."""
    generation: int = 0
    """Counts engine processes, from 1."""
    restarts: int = 0
    started_unix_s: float = 0.0
    """When this generation's process was started."""
    since_unix_s: float = 0.0
    """When ``state`` was entered."""
    diagnosis: str = ""
    """Why the last generation was lost, or why it was given up; empty once it is ready."""


class StatusBoard:
    """The newest status: written by the supervisor's thread, read and waited for by any."""

    def __init__(self, on_change: Callable[[EngineStatus], None], log: StructuredLog) -> None:
        self._on_change = on_change
        self._log = log
        self._changed = threading.Condition()
        self._status = EngineStatus(EndpointState.STARTING, since_unix_s=time.time())
        self._phase_since_s = time.monotonic()

    @property
    def status(self) -> EngineStatus:
        """The newest status."""
        status = self._status
        return dataclasses.replace(status, phase_elapsed_s=time.monotonic() - self._phase_since_s)

    @property
    def state(self) -> EndpointState:
        """The state of the newest status."""
        return self._status.state

    def wait_for(self, states: frozenset[EndpointState], timeout_s: float) -> EngineStatus:
        """Wait for one of ``states``, at most ``timeout_s``; the status then."""
        with self._changed:
            self._changed.wait_for(lambda: self._status.state in states, timeout_s)
            return self.status

    def publish(self, state: EndpointState | None = None, **fields: Any) -> None:
        """Replace ``fields`` (and the state), wake who waits, and tell the owner if anything changed."""
        with self._changed:
            before = self._status
            if state is not None and state is not before.state:
                fields |= {"state": state, "since_unix_s": time.time()}
            after = dataclasses.replace(before, **fields)
            if after == before:
                return
            if after.phase != before.phase:
                self._phase_since_s = time.monotonic()
            self._status = after
            self._changed.notify_all()
        try:
            self._on_change(after)
        except Exception as error:
            # The owner's trouble must not cost it the engine.
            self._log.warning("status callback failed", error=repr(error))
