"""Saves the controller's state and events to the store, and restores the state after a restart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import structlog

from controlplane.controller.alerting import Alerting
from controlplane.controller.controller import Controller
from controlplane.controller.keys import KeyRegistry
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.recorder import Recorder
from controlplane.controller.registry import Registry
from controlplane.controller.scaling import PlaneScaler
from controlplane.core.json_values import StoredState

_CLUSTER, _LAST_EVENTS = "cluster", "heard"
"""Keys in the store besides those of the parts: ids of Ray's nodes, and the last event of each node agent."""
_ORDERS = ("hold/", "node/", "override/", "silence/")
"""Prefixes of what operators order."""
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
        keys: KeyRegistry,
    ) -> None:
        self._recorder = recorder
        self._registry = registry
        self._controller = controller
        self._scaler = scaler
        self._alerting = alerting
        self._nodes = nodes
        self._keys = keys
        self._node_ids: Collection[str] | None = None
        self._has_new_events = True
        """Whether an event was recorded since the last save."""

    @property
    def restored(self) -> bool:
        """Whether the stored state was restored, as far as it is valid for this cluster."""
        return self._node_ids is not None

    def restore_gpus(self) -> None:
        """Restore what is valid on any cluster: API keys, unless the store can't be read now, and the health
        of GPUs."""
        if not self._recorder.warning:
            self._restore(StoredState(self._recorder.records), [self._keys.restore])
        stored = StoredState(self._recorder.state)
        for key, kind in ((_CLUSTER, list[str]), (_LAST_EVENTS, dict[str, tuple[str, int]])):
            stored.value(key, kind)
        self._restore(stored, [self._controller.restore_gpus])

    def observe_nodes(self, node_ids: Collection[str]) -> None:
        """Record Ray's nodes. The first call restores the stored state if its cluster had one of them."""
        if self._node_ids is None:
            stored = StoredState(self._recorder.state)
            if _stored_nodes(stored) & set(node_ids):
                self._restore(
                    stored, [self._controller.restore, self._scaler.restore, self._alerting.restore]
                )
            else:
                self._put_aside(stored.damaged)
        # Last: from here on the state is saved, which removes what was not restored.
        self._node_ids = node_ids

    def _restore(self, stored: StoredState, parts: Iterable[Callable[[StoredState], None]]) -> None:
        """Restore each part by itself; what can't be read is put aside."""
        for part in parts:
            try:
                part(stored)
            except Exception as error:
                # Whatever the store contains, it must not keep the controller from starting.
                log.exception("a part of the stored state was not restored", error=repr(error))
                self._controller.note("not restored", "controller", f"a part of the stored state: {error!r}")
        self._put_aside(stored.damaged)

    def _restore_late(self) -> None:
        """Restore what operators had ordered, from a file that could be read only now. Everything else that
        it has was decided anew in the meantime."""
        mine = self._recorder.state.keys()
        found = self._recorder.take_found_late()
        if found:
            self._restore(StoredState(found), [self._keys.restore])
        orders = {key: value for key, value in found.items() if key.startswith(_ORDERS) and key not in mine}
        if self._node_ids is None or not orders:
            return
        if _stored_nodes(StoredState(found)) & set(self._node_ids):
            parts = [self._controller.restore_orders, self._scaler.restore, self._alerting.restore]
            self._restore(StoredState(orders), parts)

    def _put_aside(self, damaged: Mapping[str, str]) -> None:
        """Say loudly what can't be read, and move it out of the state."""
        for key, reason in self._recorder.put_aside(damaged).items():
            log.error("a value of the store can't be read and is put aside", key=key, reason=reason)
            self._controller.note("store value unreadable", key[:200], f"put aside: {reason[:200]}")

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
        self._restore_late()
        self._put_aside({})
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
    stored = StoredState(recorder.state).value(_LAST_EVENTS, dict[str, Any]) or {}
    return StoredState(stored).entries("", tuple[str, int])


def _stored_nodes(stored: StoredState) -> set[str]:
    """The ids of the nodes of the stored cluster. If their list can't be read, the node agents' last events
    name them, too."""
    return set(stored.value(_CLUSTER, list[str]) or stored.value(_LAST_EVENTS, dict[str, Any]) or ())
