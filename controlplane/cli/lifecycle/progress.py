"""The progress of ``up`` and ``down``: a live table on a terminal, lines of text elsewhere, or JSON lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from controlplane.cli.console import say, stdout
from controlplane.cli.lifecycle.tables import diagnosis_or_phase, progress_table, tier_json
from controlplane.core.cluster.status import TierStatus
from controlplane.core.domain.event import Event

QUIET_LINE_S = 20.0
"""After this long without a change, :class:`LineProgress` prints what the command is waiting for."""


class ProgressReporter(Protocol):
    """Reports what a command does."""

    def step(self, text: str) -> None:
        """Report a step of the command."""
        ...

    def progress(self, tiers: Sequence[TierStatus], elapsed_s: float) -> None:
        """Report the state of the tiers; called often."""
        ...

    def event(self, event: Event) -> None:
        """Report an event of the running plane."""
        ...

    def result(self, kind: str, text: str, **fields: Any) -> None:
        """Report the command's outcome: ``text`` in text output, ``kind`` and ``fields`` in JSON."""
        ...

    def close(self) -> None:
        """Stop redrawing the live table."""
        ...


def progress_reporter(*, as_json: bool) -> ProgressReporter:
    """JSON lines if ``as_json``, else a live table on a terminal and lines of text elsewhere."""
    if as_json:
        return JsonProgress()
    console = stdout()
    return LiveProgress(console) if console.is_terminal else LineProgress()


class JsonProgress:
    """One JSON object per line."""

    def __init__(self) -> None:
        self._last: list[tuple[Any, ...]] = []

    def step(self, text: str) -> None:
        """See :class:`ProgressReporter`."""
        self._write("step", text=text)

    def progress(self, tiers: Sequence[TierStatus], elapsed_s: float) -> None:
        """See :class:`ProgressReporter`."""
        now = [_summary(tier) for tier in tiers]
        if now != self._last:
            self._last = now
            shown = [tier_json(tier, time.time()) for tier in tiers]
            self._write("progress", elapsed_s=round(elapsed_s, 1), tiers=shown)

    def event(self, event: Event) -> None:
        """See :class:`ProgressReporter`."""
        fields = {"kind": event.kind, "subject": event.subject, "tier": event.tier, "reason": event.reason}
        self._write("event", unix_s=event.unix_s, **fields)

    def result(self, kind: str, text: str, **fields: Any) -> None:
        """See :class:`ProgressReporter`."""
        self._write(kind, **fields)

    def close(self) -> None:
        """See :class:`ProgressReporter`."""

    def _write(self, event: str, **fields: Any) -> None:
        _print(json.dumps({"event": event, **fields}))


class LineProgress:
    """A line of text for each change."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, ...]] = {}
        self._printed_s = time.monotonic()

    def step(self, text: str) -> None:
        """See :class:`ProgressReporter`."""
        self._line(text)

    def progress(self, tiers: Sequence[TierStatus], elapsed_s: float) -> None:
        """See :class:`ProgressReporter`."""
        for tier in tiers:
            if self._last.get(tier.name) != _summary(tier):
                self._last[tier.name] = _summary(tier)
                ready = f"{tier.replicas_ready}/{tier.replicas_wanted}"
                text = f"{tier.name:<14} {tier.state:<10} {ready:<5} {diagnosis_or_phase(tier)}"
                self._line(f"{elapsed_s:6.1f} s  {text}".rstrip())
        if time.monotonic() - self._printed_s > QUIET_LINE_S:
            waiting = ", ".join(tier.name for tier in tiers if not tier.ready) or "the gateway"
            self._line(f"{elapsed_s:6.1f} s  waiting for {waiting}")

    def event(self, event: Event) -> None:
        """See :class:`ProgressReporter`."""
        self._line(_event_text(event))

    def result(self, kind: str, text: str, **fields: Any) -> None:
        """See :class:`ProgressReporter`."""
        self._line(text)

    def close(self) -> None:
        """See :class:`ProgressReporter`."""

    def _line(self, text: str) -> None:
        self._printed_s = time.monotonic()
        _print(text)


class LiveProgress:
    """A table that is redrawn in place while the tiers start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def step(self, text: str) -> None:
        """See :class:`ProgressReporter`."""
        self._console.print(Text(text, style="dim"))

    def progress(self, tiers: Sequence[TierStatus], elapsed_s: float) -> None:
        """See :class:`ProgressReporter`."""
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(Group(progress_table(tiers, elapsed_s)), refresh=True)

    def event(self, event: Event) -> None:
        """See :class:`ProgressReporter`."""
        self._console.print(Text(_event_text(event)))

    def result(self, kind: str, text: str, **fields: Any) -> None:
        """See :class:`ProgressReporter`."""
        self.close()
        self._console.print(Text(text), soft_wrap=True)  # commands in it are copied whole

    def close(self) -> None:
        """See :class:`ProgressReporter`."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def mute() -> None:
    """Discard all further output of this process once it can't be written: a plane must be stopped in
    order even if the terminal was closed or the disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _print(text: str) -> None:
    try:
        say(text)
    except OSError:
        mute()


def _summary(tier: TierStatus) -> tuple[Any, ...]:
    return (tier.name, tier.state, tier.replicas_ready, tier.replicas_wanted, tier.phase, tier.diagnosis)


def _event_text(event: Event) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.unix_s))
    return f"{clock}  {event.subject:<24} {event.kind}: {event.reason}"
