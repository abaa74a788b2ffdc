"""Detects an engine that answers its probes but makes no progress, from its own metrics.

The engine's supervisor notices when the process ends or stops answering, and a gateway when its requests get
no response. This covers the case in between. Only fresh readings count.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.telemetry.engine import EngineLoad


@dataclass(frozen=True, slots=True)
class StallRules:
    """When an engine counts as stalled."""

    after_s: float = 120.0
    """How long an engine may run requests without producing a token. Long enough for the longest prompt on a
    slow machine: its tokens are counted only once all of it was read."""


@dataclass(frozen=True, slots=True)
class StalledEngine:
    """An engine that makes no progress."""

    since_s: float
    """When it was first seen so."""
    seen_s: float
    """When it was last seen so."""
    reason: str


def stall_reason(load: EngineLoad) -> str:
    """Which readings show that the engine runs requests without progress; empty if they don't show that."""
    running = load.running.fresh
    rates = (load.generation_tokens_per_s, load.prompt_tokens_per_s, load.completions_per_s)
    known = [rate.fresh for rate in rates if rate.fresh is not None]
    if not running or load.generation_tokens_per_s.fresh is None or any(known):
        return ""
    return f"{running:.0f} requests run but produce no tokens"
