"""Saves the controller's state and events to the store, and restores the state after a restart."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict

import structlog

from controlplane.controller.alerting import Alerting
from controlplane.controller.controller import Controller
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.recorder import Recorder
from controlplane.controller.registry import Registry
from controlplane.controller.scaling import PlaneScaler
from controlplane.core.json_values import StoredState

_CLUSTER, _LAST_EVENTS = "cluster", "heard"
"""Keys in the store besides those of the parts: ids of Ray's nodes, and the last event of each node agent."""
_LOGGED = ("subject", "tier", "reason", "actor")
"""Fields of an event in the log."""

log = structlog.stdlib.get_logger(__name__)


class SavedState:
    """Nothing is saved before :meth:`observe_nodes` has shown whether the stored state belongs to the running
    cluster: saving would overwrite state that may still be needed."""

    def __init__(
        self,
        recorder: Recorder,
        *,
        registry: Registry,
        controller: Controller,
        scaler: PlaneScaler,
        alerting: Alerting,
        nodes: NodeWatch,
    ) -> None:
        self._recorder = recorder
        self._registry = registry
        self._controller = controller
        self._scaler = scaler
        self._alerting = alerting
        self._nodes = nodes
        self._node_ids: Collection[str] | None = None
        self._has_new_events = True
        """Whether an event was recorded since the last save."""

    @property
    def restored(self) -> bool:
        """Whether the stored state was restored, as far as it is valid for this cluster."""
        return self._node_ids is not None

    def restore_gpus(self) -> None:
        """Restore the health of GPUs, which is valid on any cluster that contains them."""
        stored = StoredState(self._recorder.state)
        self._controller.restore_gpus(stored)
        _warn_of_damage(stored)

    def observe_nodes(self, node_ids: Collection[str]) -> None:
        """Record Ray's nodes. The first call restores the stored state if its cluster had one of them."""
        first = self._node_ids is None
        self._node_ids = node_ids
        if first and set(node_ids) & set(self._recorder.state.get(_CLUSTER) or ()):
            stored = StoredState(self._recorder.state)
            self._controller.restore(stored)
            self._scaler.restore(stored)
            self._alerting.restore(stored)
            _warn_of_damage(stored)

    def record_events(self) -> None:
        """Write new events to the log and the audit log."""
        events = self._registry.take_events()
        for event in events:
            log.info(event.kind, **{key: value for key, value in asdict(event).items() if key in _LOGGED})
        self._has_new_events |= bool(events)
        self._recorder.add_events(events)

    def save_if_changed(self) -> None:
        """:meth:`save` if there was an event since the last time."""
        self.record_events()
        if self._has_new_events:
            self.save()

    def save(self) -> None:
        """Pass the whole state to the recorder, which writes what changed."""
        if self._node_ids is None:
            return
        self._recorder.save(
            {
                **self._controller.checkpoint(),
                **self._scaler.checkpoint(),
                **self._alerting.checkpoint(),
                _CLUSTER: sorted(self._node_ids),
                _LAST_EVENTS: {node: list(last) for node, last in self._nodes.last_events.items()},
            }
        )
        self._has_new_events = False


def stored_last_events(recorder: Recorder) -> dict[str, tuple[str, int]]:
    """Node id → epoch and number of the last event that an earlier process received from its agent."""
    return {node: (epoch, seq) for node, (epoch, seq) in recorder.state.get(_LAST_EVENTS, {}).items()}


def _warn_of_damage(stored: StoredState) -> None:
    if stored.damaged:
        log.warning("entries of the store can't be read and are dropped", entries=stored.damaged)
