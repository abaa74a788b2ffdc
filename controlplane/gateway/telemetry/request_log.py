"""What one gateway replica logs between two reports: single requests, a bounded part of them, and sums of all
by key, team, tier and session. No content of a request or a response is in it."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from heapq import heappush, heapreplace, nlargest
from typing import Final

from controlplane.core.domain.request import RequestOutcome
from controlplane.core.traffic.request_log import OTHERS, LoggedRequest, RequestBatch, UsageSums
from controlplane.gateway.request_context import RequestContext

MAX_REQUESTS: Final = 200
"""Requests in one batch."""
MAX_SUMS: Final = 4000
"""Combinations of key, tier and session that are counted one by one between two batches."""
MAX_BATCH_SESSIONS: Final = 200
"""Sessions in one batch, those with the most GPU time; the others are summed up by key and tier."""
MAX_BATCH_KEYS: Final = 1000
"""Combinations of key and tier in one batch; the others are summed up by tier."""
MAX_TEXT: Final = 128
"""Characters of a name that a client gave."""

_OK: Final = RequestOutcome.OK  # attribute look-ups on an enum class cost more than on a module

_Entry = tuple[float, int, LoggedRequest]
"""Total seconds, a number that no other entry has, the request."""


class _TierRequests:
    """The requests of one tier that are logged: the slowest, the last that failed, and some of the others."""

    __slots__ = ("failed", "others", "sample", "slow", "stride")

    def __init__(self, most: int) -> None:
        self.slow: list[_Entry] = []
        self.failed: deque[LoggedRequest] = deque(maxlen=most)
        self.sample: list[LoggedRequest] = []
        self.others = 0
        self.stride = 1

    def take_sample(self, request: LoggedRequest, most: int) -> None:
        """Add one of the others. When there are too many, every second one is dropped, and from then on only
        half as many are added, so that the sample is spread evenly over the interval."""
        self.sample.append(request)
        if len(self.sample) > most:
            del self.sample[1::2]
            self.stride *= 2


_Owner = tuple[str, str, str, str, str]
"""Key id, name, team, tier, session."""


class _Sums:
    __slots__ = _SUMMED = (
        "requests", "failed", "prompt", "generated", "gpu_s", "next_gpu_s", "priced", "priced_gpu_s",
        "last_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = self.failed = self.prompt = self.generated = self.priced = 0
        self.gpu_s = self.next_gpu_s = self.priced_gpu_s = self.last_s = 0.0

    def add(self, other: _Sums) -> None:
        """Add the sums of another owner."""
        for name in self._SUMMED[:-1]:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_s = max(self.last_s, other.last_s)


class RequestLog:
    """Filled when requests end; :meth:`batch` is what the next report carries."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self._names = tiers
        self._most = max(1, MAX_REQUESTS // (3 * (len(tiers) + 1)))
        """Of each tier and kind; requests that no tier took are one more tier."""
        self._number = 0
        self._pending: RequestBatch | None = None
        self._begin()

    def _begin(self) -> None:
        self._ended = 0
        self._tiers: dict[str, _TierRequests] = {}
        self._sums: dict[_Owner, _Sums] = {}

    def add(self, context: RequestContext, outcome: RequestOutcome, reason: str, now_s: float) -> None:
        """Log a request that has ended."""
        self._ended += 1
        self._count(context, outcome)
        tier = context.tier
        of_tier = self._tiers.get(tier)
        if of_tier is None:
            of_tier = self._tiers[tier] = _TierRequests(self._most)
        if outcome is not _OK:
            of_tier.failed.append(self._logged(context, outcome, reason, now_s))
            return
        total_s = now_s - context.arrived_s
        if len(of_tier.slow) < self._most:
            heappush(of_tier.slow, (total_s, self._ended, self._logged(context, outcome, reason, now_s)))
            return
        of_tier.others += 1
        sampled = of_tier.others % of_tier.stride == 0
        if total_s > of_tier.slow[0][0]:
            entry = (total_s, self._ended, self._logged(context, outcome, reason, now_s))
            _, _, faster = heapreplace(of_tier.slow, entry)
            if sampled:
                of_tier.take_sample(faster, self._most)
        elif sampled:
            of_tier.take_sample(self._logged(context, outcome, reason, now_s), self._most)

    def batch(self) -> RequestBatch:
        """What was logged since the last batch that was delivered before. Until :meth:`delivered` is called
        it stays the same one, and what ends meanwhile waits for the next."""
        if self._pending is None:
            self._number += 1
            requests = [
                request
                for of_tier in self._tiers.values()
                for request in (*(entry[2] for entry in of_tier.slow), *of_tier.failed, *of_tier.sample)
            ]
            self._pending = RequestBatch(
                self._number, time.time(), self._ended, tuple(requests[:MAX_REQUESTS]), self._usage()
            )
            self._begin()
        return self._pending

    def delivered(self, number: int) -> None:
        """The batch of this number has arrived."""
        if self._pending is not None and self._pending.number == number:
            self._pending = None

    def _count(self, context: RequestContext, outcome: RequestOutcome) -> None:
        who = context.principal
        owner = (who.id, who.name, who.team, context.tier, context.session)
        sums = self._sums.get(owner)
        if sums is None:
            if len(self._sums) >= MAX_SUMS:
                owner = (OTHERS, OTHERS, "", context.tier, OTHERS if context.session else "")
            sums = self._sums.setdefault(owner, _Sums())
        sums.requests += 1
        sums.failed += outcome is not _OK
        sums.prompt += context.prompt_tokens
        sums.generated += context.generated_tokens
        sums.gpu_s += context.gpu_s
        if context.next_gpu_s is not None:
            sums.next_gpu_s += context.next_gpu_s
            sums.priced += 1
            sums.priced_gpu_s += context.gpu_s
        sums.last_s = time.time()

    def _usage(self) -> tuple[UsageSums, ...]:
        """The sums of all requests, in a bounded number of items."""
        sessions = [item for item in self._sums.items() if item[0][4] not in ("", OTHERS)]
        named = dict(nlargest(MAX_BATCH_SESSIONS, sessions, key=lambda item: item[1].gpu_s))
        rest: dict[_Owner, _Sums] = {}
        for owner, sums in self._sums.items():
            if owner not in named:
                whole = (*owner[:4], OTHERS if owner[4] else "")
                if whole not in rest and len(rest) >= MAX_BATCH_KEYS:
                    whole = (OTHERS, OTHERS, "", owner[3], whole[4])
                rest.setdefault(whole, _Sums()).add(sums)
        return tuple(
            UsageSums(
                *owner[:4],
                session=_bounded(owner[4]),
                requests=s.requests,
                failed=s.failed,
                prompt_tokens=s.prompt,
                generated_tokens=s.generated,
                gpu_s=s.gpu_s,
                next_tier_gpu_s=s.next_gpu_s,
                priced_requests=s.priced,
                priced_gpu_s=s.priced_gpu_s,
                last_unix_s=s.last_s,
            )
            for owner, s in (*named.items(), *rest.items())
        )

    def _logged(
        self, context: RequestContext, outcome: RequestOutcome, reason: str, now_s: float
    ) -> LoggedRequest:
        route = context.route
        load = context.decision.load if context.decision is not None else None
        first_s = context.first_byte_s
        return LoggedRequest(
            unix_s=time.time(),
            request_id=context.request_id,
            session=_bounded(context.session),
            asked=self._names[route.order[0]] if route is not None and route.order else "",
            tier=context.tier,
            endpoint=load.endpoint.endpoint_id if load is not None else "",
            model=context.request.model[:MAX_TEXT],
            api=context.api,
            stream=context.stream,
            outcome=outcome,
            reason=reason,
            prompt_tokens=context.prompt_tokens,
            generated_tokens=context.generated_tokens,
            queued_s=context.queued_s,
            ttft_s=first_s - context.arrived_s if context.stream and first_s else None,
            total_s=now_s - context.arrived_s,
            attempts=context.attempts,
            resumed=context.resumed,
            gpu_s=context.gpu_s,
            key=context.principal.id,
            key_name=context.principal.name,
            team=context.principal.team,
        )


def _bounded(session: str) -> str:
    return session if len(session) <= MAX_TEXT else f"sha256:{hashlib.sha256(session.encode()).hexdigest()}"
