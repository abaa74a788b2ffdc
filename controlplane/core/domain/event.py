"""An entry of the audit log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened or was done, and why."""

    number: int
    """Counts the events of one controller process, from 1."""
    unix_s: float
    kind: str
    subject: str
    """An endpoint id, a gateway id, a GPU's UUID, a node id, a tier, or ``controller``."""
    reason: str
    tier: str = ""
    actor: str = "controller"
    """Who caused it: ``controller`` or ``operator``."""
