"""The controller's targets for Serve's autoscaler: fetched in a thread, read without waiting.

One thread of a process fetches for all tiers of a namespace. It ends when no policy reads targets any more.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Final

import structlog
from ray.exceptions import RayError

from controlplane.controller.api import ControllerApi
from controlplane.controller.handle import ControllerHandle, find_controller
from controlplane.core.reconcile.replica_targets import TierTarget, desired_replicas

REFRESH_S: Final = 0.5
CALL_TIMEOUT_S: Final = 5.0
FIRST_LIMIT_S: Final = 30.0
"""How long tiers keep their present replicas while no target was fetched yet: Serve's own controller may have
been killed during a migration, or while a tier was drained."""

log = structlog.stdlib.get_logger(__name__)

Fetch = Callable[[], Mapping[str, TierTarget]]


class Targets:
    """The last targets of all tiers, refreshed in a thread while there are readers."""

    def __init__(
        self, fetch: Fetch, *, refresh_s: float = REFRESH_S, first_limit_s: float = FIRST_LIMIT_S
    ) -> None:
        self._fetch = fetch
        self._refresh_s = refresh_s
        self._expected_until_s = time.monotonic() + first_limit_s
        self._last: Mapping[str, TierTarget] = {}
        self._readers: weakref.WeakSet[TierTargets] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def attach(self, reader: TierTargets) -> None:
        """Refresh targets for as long as ``reader`` exists."""
        with self._lock:
            self._readers.add(reader)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tierplane-targets", daemon=True)
                self._thread.start()

    def of(self, tier: str) -> TierTarget | None:
        """The tier's last target. Never waits."""
        return self._last.get(tier)

    @property
    def expected(self) -> bool:
        """Whether tiers still wait for the first targets."""
        return time.monotonic() < self._expected_until_s

    def _run(self) -> None:
        failing = False
        while True:
            with self._lock:
                if not self._readers:
                    self._thread = None
                    return
            try:
                self._last = self._fetch()
                self._expected_until_s = 0.0
                failing = False
            except Exception as error:  # No error may stop Serve's controller.
                if not failing:
                    log.info("no targets from the controller", reason=str(error).strip()[:300])
                failing = True
            time.sleep(self._refresh_s)


class TierTargets:
    """One tier's target, for its policy."""

    def __init__(self, targets: Targets, tier: str, configured: int, *, scales: bool = False) -> None:
        self._targets = targets
        self._tier = tier
        self._configured = configured
        self._scales = scales
        self._logged = ""
        targets.attach(self)

    def desired(self, running: Collection[str], present: int) -> int:
        """The number of replicas to run. ``running`` are the endpoint ids of the running replicas,
        ``present`` is the number that Serve aims at now. Never waits."""
        target = self._targets.of(self._tier)
        desired = desired_replicas(
            target,
            time.time(),
            configured=self._configured,
            running=running,
            present=present if self._scales or self._targets.expected else None,
        )
        if desired.replicas != present and desired.reason != self._logged:
            log.info("target", tier=self._tier, replicas=desired.replicas, reason=desired.reason)
            self._logged = desired.reason
        return desired.replicas


def tier_targets(tier: str, configured: int, namespace: str, *, scales: bool = False) -> TierTargets:
    """The tier's target from the controller of ``namespace``; all tiers share a thread."""
    with _lock:
        targets = _by_namespace.setdefault(namespace, Targets(_fetch_from(namespace)))
    return TierTargets(targets, tier, configured, scales=scales)


_lock = threading.Lock()
_by_namespace: dict[str, Targets] = {}


def _fetch_from(namespace: str) -> Fetch:
    controller: ControllerHandle | None = None

    def fetch() -> Mapping[str, TierTarget]:
        nonlocal controller
        controller = controller or find_controller(namespace)
        if controller is None:
            raise ValueError(f"there is no controller in namespace '{namespace}'")
        try:
            return controller.get(CALL_TIMEOUT_S, ControllerApi.targets)
        except RayError:
            controller = None  # There may be a new one.
            raise

    return fetch
