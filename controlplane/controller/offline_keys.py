"""Changes the keys in the store of a plane that does not run: the first operator's key can exist before the
first start."""

from __future__ import annotations

import time
from pathlib import Path

from controlplane.controller.keys import KeyRegistry, KeyRequest, KeyResponse
from controlplane.controller.store import Store
from controlplane.core.access.keys import KeyRecord
from controlplane.core.domain.event import Event
from controlplane.core.json_values import StoredState
from controlplane.errors import SetupError


class OfflineKeys:
    """The keys in one store, which no controller may use meanwhile. Raises SetupError if it can't be used."""

    def __init__(self, path: Path) -> None:
        self._store = Store(path)
        if self._store.warning:
            warning = self._store.warning
            self._store.close()
            raise SetupError(f"the keys can't be changed: {warning}")
        self._keys = KeyRegistry(time.time, self._note)
        self._keys.restore(StoredState(self._store.values()))

    def close(self) -> None:
        """Let a controller use the store."""
        self._store.close()

    def create(self, request: KeyRequest, by: str) -> KeyResponse:
        """See :meth:`KeyRegistry.create`."""
        return self._stored(self._keys.create(request, by))

    def revoke(self, subject: str, by: str) -> KeyResponse:
        """See :meth:`KeyRegistry.revoke`."""
        return self._stored(self._keys.revoke(subject, by))

    def rotate(self, subject: str, grace_s: float, by: str) -> KeyResponse:
        """See :meth:`KeyRegistry.rotate`."""
        return self._stored(self._keys.rotate(subject, grace_s, by))

    def records(self) -> tuple[KeyRecord, ...]:
        """See :attr:`KeyRegistry.records`."""
        return self._keys.records

    def _stored(self, response: KeyResponse) -> KeyResponse:
        self._store.put(self._keys.take_unsaved())
        if self._store.warning:
            raise SetupError(f"not stored: {self._store.warning}")
        return response

    def _note(self, kind: str, subject: str, reason: str, by: str) -> None:
        self._store.audit(Event(0, time.time(), kind, subject, reason, actor=by))
