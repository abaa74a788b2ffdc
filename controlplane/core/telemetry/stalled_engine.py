"""Detects an engine that answers its probes but makes no progress, from its own metrics.

The engine's supervisor notices when the process exits or stops answering its probes, and a gateway notices
when its requests get no response. This module covers the case in between. Only fresh readings count.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.telemetry.engine import EngineLoad


@dataclass(frozen=True, slots=True)
class StallRules:
    """When an engine counts as stalled."""

    after_s: float = 120.0
    """How long an engine may run requests without producing a token. It must exceed the time that a slow
    machine needs for the longest prompt: a prompt's tokens are counted only once all are processed."""


@dataclass(frozen=True, slots=True)
class StalledEngine:
    """An engine that makes no progress."""

    since_s: float
    """When the stall was first observed."""
    seen_s: float
    """When the stall was last observed."""
    reason: str


def stall_reason(load: EngineLoad) -> str:
    """Which readings show that the engine runs requests without progress; empty if they don't show that."""
    running = load.running.fresh
    rates = (load.generation_tokens_per_s, load.prompt_tokens_per_s, load.completions_per_s)
    known = [rate.fresh for rate in rates if rate.fresh is not None]
    if not running or load.generation_tokens_per_s.fresh is None or any(known):
        return ""
    return f"{running:.0f} requests run but produce no tokens"
