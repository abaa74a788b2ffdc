"""Writes the controller's state, audit log and history to the store, in a thread of its own.

The event loop only queues: a slow or full disk affects nothing else (see
:class:`~controlplane.controller.store.Store`). While more than :data:`QUEUE_LIMIT` items wait, points of the
history and logged requests are dropped; state and audit entries never are.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from controlplane.controller.keys import STORED_AT
from controlplane.controller.store import Store
from controlplane.core.domain.event import Event
from controlplane.core.traffic.request_log import RequestBatch

log = structlog.stdlib.get_logger(__name__)

QUEUE_LIMIT = 1000
COMPACT_INTERVAL_S = 300.0
MAX_GATEWAYS = 1000
"""Gateways whose last batch of logged requests is remembered."""
ASIDE_SHOWN_S = 86_400.0
"""For how long an alert names a value that was put aside."""
RETRY_POLL_S = 2.0
"""How often the thread asks the store whether it is time to try a file again that could not be used."""
CLOSE_TIMEOUT_S = 5.0


class Recorder:
    """One store and the thread that writes to it. With ``path`` None everything is in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.store = Store(path)
        values = self.store.values()
        self.state: Mapping[str, Any] = {key: values[key] for key in values if not _is_record(key)}
        """The last saved state, written or queued."""
        self.records: Mapping[str, Any] = {key: values[key] for key in values if _is_record(key)}
        """The records that were stored when this began."""
        self._aside = {key: unix_s for key, unix_s, *_ in self.store.aside()}
        """When a value was last put aside, by key."""
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        """What the thread is to call."""
        self._dropped = 0
        self._batches: OrderedDict[str, int] = OrderedDict()
        """The last batch of each gateway."""
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    @property
    def warning(self) -> str:
        """Why the state would not survive a restart; empty: it would."""
        return self.store.warning

    def save(self, values: Mapping[str, Any]) -> None:
        """Save this as the whole state; keys that are not in it are removed."""
        saved = self.state
        changed = {
            key: value
            for key, value in values.items()
            if (before := saved.get(key)) is not value and before != value
        }
        changed |= dict.fromkeys(saved.keys() - values.keys())
        if changed:
            self.state = dict(values)
            self._queue.put(partial(self.store.put, changed))

    def put_records(self, values: Mapping[str, Any]) -> None:
        """Write records, which :meth:`save` leaves as they are. Blocks until they are stored; afterwards
        :attr:`warning` says whether they would survive a restart."""
        if values:
            self.store.put(values)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Keys of values that were put aside within :data:`ASIDE_SHOWN_S`."""
        since_unix_s = time.time() - ASIDE_SHOWN_S
        return tuple(key for key, unix_s in self._aside.items() if unix_s > since_unix_s)

    def put_aside(self, damaged: Mapping[str, str]) -> dict[str, str]:
        """Move values that mean nothing out of the state; ``damaged`` has the reasons by key. Returns them
        with those that the store itself has put aside since the last call."""
        if damaged:
            self.state = {key: value for key, value in self.state.items() if key not in damaged}
            self._queue.put(partial(self.store.put_aside, dict(damaged)))
        reasons = self.store.take_unreadable() | dict(damaged)
        self._aside |= dict.fromkeys(reasons, time.time())
        return reasons

    def take_found_late(self) -> dict[str, Any]:
        """See :meth:`Store.take_found_late`. The next :meth:`save` removes what is not in it from the
        file."""
        found = self.store.take_found_late()
        state = {key: found[key] for key in found if not _is_record(key)}
        if state:
            self.state = {**state, **self.state}
        return found

    def add_events(self, events: Sequence[Event]) -> None:
        """Add events to the audit log."""
        if events:
            self._queue.put(partial(self._audit, tuple(events)))

    def add_points(self, unix_s: float, values: Mapping[str, float]) -> None:
        """Add one value to each of these series of the history."""
        if not self._drops():
            self._queue.put(partial(self.store.add_points, unix_s, dict(values)))

    def add_requests(self, gateway_id: str, batch: RequestBatch) -> None:
        """Add what a gateway has logged; a batch that came before is ignored."""
        if self._batches.get(gateway_id, 0) >= batch.number:
            return
        self._batches[gateway_id] = batch.number
        self._batches.move_to_end(gateway_id)
        if len(self._batches) > MAX_GATEWAYS:
            self._batches.popitem(last=False)
        if batch.ended and not self._drops():
            self._queue.put(partial(self.store.add_requests, batch))

    def _drops(self) -> bool:
        """Whether the queue is too long for more of the history."""
        if self._queue.qsize() <= QUEUE_LIMIT:
            return False
        self._dropped += 1
        if self._dropped == 1 or self._dropped % 1000 == 0:
            log.warning("parts of the history are dropped: the store is too slow", times=self._dropped)
        return True

    def events(self, after: int, limit: int) -> tuple[Event, ...]:
        """Up to ``limit`` entries of the audit log after number ``after``, oldest first; with a negative
        ``after`` the last ones. Blocks; not for an event loop."""
        if after < 0:
            after = max(0, self.store.last_number - limit)
        return tuple(self.store.audit_since(after, limit))

    def _audit(self, events: Sequence[Event]) -> None:
        for event in events:
            self.store.audit(event)

    def close(self) -> None:
        """Write what is queued, and close the file."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        self.store.close()

    def _run(self) -> None:
        compacted_s = time.monotonic()
        while True:
            write: Callable[[], object] | None = None
            with contextlib.suppress(queue.Empty):
                write = self._queue.get(timeout=RETRY_POLL_S)
                if write is None:
                    return
            try:
                self.store.retry()
                if write is not None:
                    write()
                if time.monotonic() - compacted_s > COMPACT_INTERVAL_S:
                    compacted_s = time.monotonic()
                    self.store.compact(time.time())
            except Exception as error:
                # No error here may stop the controller; the log shows what was not written.
                log.critical("could not be stored", write=repr(write)[:500], error=repr(error))


def _is_record(key: str) -> bool:
    """Whether a value of the store is a record: no part of the controller's state, but written by itself, at
    once, and valid whatever the cluster."""
    return key.startswith(STORED_AT)
