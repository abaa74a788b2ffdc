"""Writes the controller's state, audit log and history down, on a thread of its own.

The event loop only hands over; a disk that is slow or full delays and fails here and nowhere else (what
:class:`~controlplane.controller.store.Store` does about it). If the thread falls behind by more than
:data:`QUEUE_LIMIT` items, history is left out first; state and audit entries never are.
"""

from __future__ import annotations

import contextlib
import fcntl
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import structlog

from controlplane.controller.store import AuditEntry, Store
from controlplane.core.domain.event import Event

log = structlog.stdlib.get_logger(__name__)

QUEUE_LIMIT = 1000
COMPACT_INTERVAL_S = 300.0
CLOSE_TIMEOUT_S = 5.0


class Recorder:
    """One store and the thread that writes it. ``path`` None: in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._lock_file: IO[bytes] | None = None
        self.path = self._take(path)
        self.store = Store(self.path)
        self._saved: dict[str, Any] = self.store.values()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    @property
    def state(self) -> Mapping[str, Any]:
        """What is stored, or on its way there."""
        return self._saved

    @property
    def warning(self) -> str:
        """Why what is stored now would not survive a restart; empty: it would."""
        return self.store.warning

    def save(self, values: Mapping[str, Any]) -> None:
        """Makes this the whole state: keys that are no longer there are removed."""
        saved = self._saved
        changed = {
            key: value
            for key, value in values.items()
            if (before := saved.get(key)) is not value and before != value
        }
        changed |= dict.fromkeys(self._saved.keys() - values.keys())
        if changed:
            self._saved = dict(values)
            self._queue.put(("state", changed))

    def write_down(self, events: Sequence[Event]) -> None:
        """Adds events to the audit log."""
        if events:
            self._queue.put(("audit", tuple(events)))

    def add_points(self, unix_s: float, values: Mapping[str, float]) -> None:
        """Adds one figure to each series of the history."""
        if self._queue.qsize() > QUEUE_LIMIT:
            self._left_out += 1
            if self._left_out == 1 or self._left_out % 1000 == 0:
                log.warning("history is left out: the store is too slow", points=self._left_out)
            return
        self._queue.put(("points", (unix_s, dict(values))))

    def events(self, after: int, limit: int) -> tuple[Event, ...]:
        """Entries of the audit log after number ``after``, oldest first; a negative ``after``: the last ones.
        Blocks: not for an event loop."""
        if after < 0:
            after = max(0, self.store.last_seq - limit)
        return tuple(
            Event(
                entry.seq, entry.unix_s, entry.action, entry.target, entry.reason, entry.detail, entry.actor
            )
            for entry in self.store.audit_since(after, limit)
        )

    def close(self) -> None:
        """Writes what is handed over and closes the file."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        self.store.close()
        if self._lock_file is not None:
            self._lock_file.close()

    def _take(self, path: Path | None) -> Path | None:
        """The path, if no other controller writes there."""
        if path is None:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.with_name(path.name + ".lock").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                log.critical(
                    "another controller writes this store: state, audit log and history are in memory only",
                    path=str(path),
                    remedy="give each plane a controller.namespace or a controller.store_path of its own",
                )
                return None
            self._lock_file = file
        except OSError as error:
            # the store itself says what is wrong with the folder, and tries again
            log.warning("can't lock the store", path=str(path), error=str(error))
        return path

    def _run(self) -> None:
        compacted_s = time.monotonic()
        while True:
            item: _Item | None = None
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(timeout=COMPACT_INTERVAL_S)
                if item is None:
                    return
            try:
                if item is not None:
                    self._write(*item)
                if time.monotonic() - compacted_s > COMPACT_INTERVAL_S:
                    compacted_s = time.monotonic()
                    self.store.compact(time.time())
            except Exception as error:
                # whatever it is, the controller goes on; what was to be written is in the log
                log.critical("could not be written down", what=repr(item)[:500], error=repr(error))

    def _write(self, kind: str, what: Any) -> None:
        if kind == "state":
            self.store.put(what)
        elif kind == "audit":
            for event in what:
                self.store.audit(
                    AuditEntry(event.unix_s, event.actor, event.kind, event.subject, event.reason, event.tier)
                )
        else:
            self.store.add_points(*what)


_Item = tuple[str, Any]
