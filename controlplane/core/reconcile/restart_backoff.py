"""Whether and when an engine process that was lost is started again.

The delay doubles with every restart within the window, and returns to its first value once the window has
passed. So a rare crash costs half a second, and a crash loop is given up soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The limits of restarting."""

    max_restarts: int
    """Restarts allowed within ``window_s``; at the next loss the engine is given up."""
    window_s: float
    backoff_initial_s: float
    backoff_max_s: float


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """Start the engine again after ``delay_s``, or give up; ``reason`` says why."""

    restart: bool
    delay_s: float
    reason: str


def decide_restart(
    policy: RestartPolicy, restarted_s: Sequence[float], now_s: float, *, permanent: bool = False
) -> RestartDecision:
    """What to do about an engine lost at ``now_s`` that was restarted at the times ``restarted_s``.

    ``permanent`` means that its diagnosis says another start would fail in the same way.
    """
    if permanent:
        return RestartDecision(False, 0.0, "starting it again would not help")
    if policy.max_restarts == 0:
        return RestartDecision(False, 0.0, "restart.max_restarts is 0")
    recent = sum(1 for at_s in restarted_s if now_s - at_s < policy.window_s)
    if recent >= policy.max_restarts:
        times = "once" if recent == 1 else f"{recent} times"
        return RestartDecision(
            False,
            0.0,
            f"restarted {times} in the last {policy.window_s:g} s, the limit is {policy.max_restarts}",
        )
    # The exponent is limited to avoid an overflow; 2^60 exceeds any maximum.
    delay_s = min(policy.backoff_initial_s * 2.0 ** min(recent, 60), policy.backoff_max_s)
    return RestartDecision(
        True, delay_s, f"restart {recent + 1} of {policy.max_restarts} in {policy.window_s:g} s"
    )
