"""Whether and when a lost engine process is started again.

The wait doubles with every restart inside the window and starts anew once the window is past: a rare crash
costs half a second, a crash loop ends soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The limits of restarting."""

    max_restarts: int
    """Restarts inside ``window_s`` before it is given up."""
    window_s: float
    backoff_initial_s: float
    backoff_max_s: float


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """Start it again after ``delay_s``, or give up; ``reason`` says why."""

    restart: bool
    delay_s: float
    reason: str


def decide_restart(
    policy: RestartPolicy, restarted_s: Sequence[float], now_s: float, *, permanent: bool = False
) -> RestartDecision:
    """What to do about an engine lost at ``now_s`` that was restarted at the times ``restarted_s``.

    ``permanent`` says that its diagnosis rules out that starting it again helps.
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
    # Beyond 2^60 the product is over any bound there is.
    delay_s = min(policy.backoff_initial_s * 2.0 ** min(recent, 60), policy.backoff_max_s)
    return RestartDecision(
        True, delay_s, f"restart {recent + 1} of {policy.max_restarts} in {policy.window_s:g} s"
    )
