"""The GPU time that a request cost, and its estimated cost at the next tier.

Requests that run at the same time share an engine's GPUs. They are charged by processor sharing: while ``n``
requests run on an endpoint with ``g`` GPUs, each pays ``g / n`` GPU-seconds per second. There is one integral
of that rate per endpoint (the virtual time of fair queueing: Demers, Keshav and Shenker, "Analysis and
simulation of a fair queueing algorithm", 1989). A request's cost is the difference between the integral at
its end and at its start, whatever other requests began or ended meanwhile.

An engine without a GPU is charged as one device, in device-seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MAX_SESSIONS: Final = 10_000
MAX_OWNERS: Final = 1000
"""Teams, or keys without a team, whose usage by tier is stored one by one."""
SMOOTHING: Final = 0.05
"""Weight of the latest request in a tier's mean GPU-seconds per token."""


class EndpointPriceMeter:
    """The integral over time of the GPU-seconds per second that one request on an endpoint pays."""

    __slots__ = ("_devices", "_price_s", "_running", "_since_s")

    def __init__(self, devices: float, now_s: float) -> None:
        self._devices = devices
        self._running = 0
        self._price_s = 0.0
        self._since_s = now_s

    def start(self, now_s: float) -> float:
        """A request begins. Returns the reading for :meth:`stop`."""
        self._advance(now_s)
        self._running += 1
        return self._price_s

    def stop(self, reading: float, now_s: float) -> float:
        """A request ends. Returns its GPU-seconds; ``reading`` is the value that :meth:`start` returned."""
        self._advance(now_s)
        self._running -= 1
        return self._price_s - reading

    def _advance(self, now_s: float) -> None:
        if self._running:
            self._price_s += (now_s - self._since_s) * self._devices / self._running
        self._since_s = now_s


@dataclass(slots=True)
class Usage:
    """Sums of finished requests."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    gpu_seconds: float = 0.0
    next_tier_gpu_seconds: float = 0.0
    """Estimated cost of the same tokens at the next more capable tier, over the requests for which it is
    known."""
    unpriced_requests: int = 0
    """Requests whose cost at the next tier is unknown: no such tier exists, or it has served no tokens
    yet."""

    def add(self, prompt: int, generated: int, gpu_s: float, next_gpu_s: float | None) -> None:
        """Add one request."""
        self.requests += 1
        self.prompt_tokens += prompt
        self.generated_tokens += generated
        self.gpu_seconds += gpu_s
        if next_gpu_s is None:
            self.unpriced_requests += 1
        else:
            self.next_tier_gpu_seconds += next_gpu_s


class UsageLedger:
    """Usage by tier, by owner (a team, or a key without one) and tier, and by owner and session. Only the
    last :data:`MAX_OWNERS` owners and :data:`MAX_SESSIONS` sessions are stored."""

    def __init__(self, tiers: list[str]) -> None:
        self._next = dict(zip(tiers, [*tiers[1:], ""], strict=True))
        self._rate: dict[str, float] = {}
        self.tiers: dict[str, Usage] = {tier: Usage() for tier in tiers}
        self._owners: OrderedDict[str, dict[str, Usage]] = OrderedDict()
        self._sessions: OrderedDict[tuple[str, str], Usage] = OrderedDict()

    def record(
        self, tier: str, owner: str, session: str, prompt: int, generated: int, gpu_s: float
    ) -> float | None:
        """Add a finished request. Returns its estimated GPU-seconds at the next tier; None if unknown."""
        tokens = prompt + generated
        if tokens:
            rate = gpu_s / tokens
            known = self._rate.get(tier)
            self._rate[tier] = rate if known is None else known + SMOOTHING * (rate - known)
        next_rate = self._rate.get(self._next.get(tier, ""))
        next_gpu_s = None if next_rate is None or not tokens else next_rate * tokens
        self.tiers.setdefault(tier, Usage()).add(prompt, generated, gpu_s, next_gpu_s)
        if owner:
            tiers = self._owners.setdefault(owner, {})
            tiers.setdefault(tier, Usage()).add(prompt, generated, gpu_s, next_gpu_s)
            self._owners.move_to_end(owner)
            if len(self._owners) > MAX_OWNERS:
                self._owners.popitem(last=False)
        if session:
            owned = owner, session
            self._sessions.setdefault(owned, Usage()).add(prompt, generated, gpu_s, next_gpu_s)
            self._sessions.move_to_end(owned)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return next_gpu_s

    def of_owner(self, owner: str) -> dict[str, Usage]:
        """Tier → what this owner has used of it."""
        return self._owners.get(owner, {})

    def session(self, owner: str, session: str) -> Usage | None:
        """The usage of one session of this owner; None if it is not stored."""
        return self._sessions.get((owner, session))
