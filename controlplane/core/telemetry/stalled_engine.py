"""An engine that answers its probes but makes nothing: seen in what it says of itself.

Its supervisor sees an engine that ends or no longer answers, and a gateway one that is silent on its
requests; this is for the one in between. Readings that are not fresh say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.telemetry.engine import EngineLoad


@dataclass(frozen=True, slots=True)
class StallRules:
    """Times."""

    after_s: float = 120.0
    """An engine that runs requests and makes nothing for this long is hung. Long enough for the longest
    prompt on a slow machine, which counts only when all of it was read."""


@dataclass(frozen=True, slots=True)
class StalledEngine:
    """An engine that has made nothing for a while."""

    since_s: float
    seen_s: float
    """When that was last seen."""
    reason: str


def stall_reason(load: EngineLoad) -> str:
    """By which readings the engine runs requests and gets nowhere; empty: not so, or not known."""
    running = load.running.fresh
    rates = (load.generation_tokens_per_s, load.prompt_tokens_per_s, load.completions_per_s)
    known = [rate.fresh for rate in rates if rate.fresh is not None]
    if not running or load.generation_tokens_per_s.fresh is None or any(known):
        return ""
    return f"{running:.0f} requests run and no token comes"
