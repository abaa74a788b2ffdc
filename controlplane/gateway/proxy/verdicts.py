"""Whose fault it was that an engine answered with an error of its own (500): the engine's or the request's.

Many engines answer 500 for a request that they can't process: llama.cpp for an image without a projector,
vLLM and SGLang for ``tools`` that are a string. If such errors opened circuit breakers, one client could
block a tier for all clients. If they did not, an engine whose GPU has failed would go on getting requests. So
each such error is first an accusation, and the verdict depends on what follows:

* Another endpoint of the tier answers the same request: the engine was at fault.
* Another endpoint refuses it alike, with the same status and text: the request is at fault.
* Neither is known, as with one endpoint: the engine is at fault unless it serves others. It does if it has
  sent a token within :data:`PROOF_S`; otherwise the gateway asks it for one token (:meth:`Verdicts.check`).
  All accusations of the moment share one check.
* If endpoints refuse requests alike again and again, and serve none in between, they are checked, too.

A request that was at fault is answered with the engine's own error; it counts for no breaker, no SLO and no
alert. A check that gets no clear result (the engine is busy, the gateway has no sockets) blames neither.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any, Final

import msgspec

from controlplane.core.routing.retry import AttemptFailure
from controlplane.gateway.proxy.attempt import Attempt
from controlplane.gateway.proxy.connections import EndpointConnections
from controlplane.gateway.proxy.engine_errors import BACK_PRESSURE, NOT_THE_CLIENTS, same_refusal, whole_error
from controlplane.gateway.proxy.upstream import UpstreamFailure
from controlplane.gateway.request_context import RequestContext
from controlplane.gateway.telemetry.metrics import Metrics

PROOF_S: Final = 2.0
"""A token that an engine sent this recently shows that it works."""
CHECK_TIMEOUT_S: Final = 5.0
MAX_DOUBTS: Final = 3
"""So many requests in a row that were refused alike, with no success in between, lead to a check."""
MAX_CHECK_BYTES: Final = 256 * 1024
FAULT_WEIGHT: Final = 3
"""For the breaker: an engine that can't generate one token is useless."""
THE_REQUEST: Final = "request"
"""The kind, in metrics, of a failed attempt for which the request was to blame."""

_encode = msgspec.json.Encoder().encode


class Accusation:
    """One failed attempt for which it is not known yet whether the endpoint or the request is to blame."""

    __slots__ = ("failure", "kind", "load", "probe", "retried_at", "tier", "upstream")

    def __init__(self, attempt: Attempt, failure: UpstreamFailure, kind: AttemptFailure) -> None:
        self.failure = failure
        self.kind = kind
        self.load = attempt.load
        self.probe = attempt.slot.probe
        self.tier = attempt.load.endpoint.tier
        self.upstream: EndpointConnections = attempt.upstream
        self.retried_at = ""
        """The tier for which the retry that followed is counted; empty if none followed."""


class Verdicts:
    """Judges the accusations of one gateway replica's requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._checks: dict[str, asyncio.Task[bool | None]] = {}
        """By ``EndpointLoad.key``; at most one for each endpoint, for at most :data:`CHECK_TIMEOUT_S`."""

    def accuse(self, attempt: Attempt, failure: UpstreamFailure, kind: AttemptFailure) -> None:
        """End an attempt that failed with an error of the engine's own; the verdict comes later."""
        accusation = Accusation(attempt, failure, kind)
        attempt.end_unjudged()
        context = attempt.context
        context.accusations = [*(context.accusations or ()), accusation]

    def alike(self, context: RequestContext) -> bool:
        """Whether the last accused endpoint refused the request as an earlier one did."""
        accusations = context.accusations
        if accusations is None or len(accusations) < 2:
            return False
        *earlier, last = (accusation.failure.report for accusation in accusations)
        return last is not None and any(report and same_refusal(report, last) for report in earlier)

    def answered(self, context: RequestContext, attempt: Attempt) -> None:
        """Judge the accusations of a request that another endpoint has answered."""
        accusations, context.accusations = context.accusations, None
        for accusation in accusations or ():
            if accusation.tier == attempt.load.endpoint.tier:
                self._endpoint_at_fault(accusation, 1)
            else:  # another model can do more: that proves nothing
                self._judge_later(accusation)

    async def request_at_fault(self, context: RequestContext, *, alike: bool) -> bool:
        """Judge the accusations of a request that is given up. Whether the request itself is to blame: no
        endpoint is."""
        accusations, context.accusations = context.accusations or [], None
        doubts = [self._doubt(accusation) for accusation in accusations if alike]
        if alike and max(doubts) < MAX_DOUBTS:
            for accusation in accusations:
                self._request_at_fault(accusation)
            return True
        blameless = True
        for position, accusation in enumerate(accusations):
            try:
                works = await self._result(accusation, context.deadline_s)
            except asyncio.CancelledError:
                context.accusations = accusations[position:]
                raise
            self._judge(accusation, works)
            blameless = blameless and (works is True or (alike and works is None))
        return blameless and bool(accusations)

    def later(self, context: RequestContext) -> None:
        """Judge in the background what is left when a request has ended: its client left, or its stream was
        broken off."""
        accusations, context.accusations = context.accusations, None
        for accusation in accusations or ():
            self._judge_later(accusation)

    def close(self) -> None:
        """End the checks."""
        for check in list(self._checks.values()):
            check.cancel()

    # -- checks ----------------------------------------------------------------------------------

    def check(self, accusation: Accusation) -> asyncio.Task[bool | None]:
        """Ask the accused engine for one token. Whether it works; None if that remains unknown."""
        key = accusation.load.key
        check = self._checks.get(key)
        if check is None:
            check = self._checks[key] = asyncio.ensure_future(self._check(accusation))
            check.add_done_callback(lambda _: self._checks.pop(key, None))
        return check

    async def _check(self, accusation: Accusation) -> bool | None:
        endpoint = accusation.load.endpoint
        if endpoint.capabilities.embeddings and not endpoint.capabilities.responses:
            path = "/v1/embeddings"
            body: dict[str, Any] = {"model": endpoint.model, "input": "ping"}
        else:
            path = "/v1/chat/completions"
            messages = [{"role": "user", "content": "ping"}]
            body = {"model": endpoint.model, "messages": messages, "max_tokens": 1}
        origin = accusation.upstream.origin
        request = origin.request("POST", path, "tierplane-check", _encode(body))
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                connection = await origin.acquire(fresh=True)
                try:
                    connection.send(request)
                    status = await connection.head()
                    data = b""
                    while (more := await connection.read()) and len(data) < MAX_CHECK_BYTES:
                        data += more
                finally:
                    connection.close()
        except TimeoutError:
            return None
        except UpstreamFailure as failure:
            return None if failure.kind is None or failure.kind is AttemptFailure.GATEWAY else False
        if status in BACK_PRESSURE:
            return None
        works = status < 500 and status not in NOT_THE_CLIENTS
        if works and status < 300:
            report = whole_error(data, b"")
            works = report is None or report.by_client
        if works:
            accusation.load.proved_s = monotonic()
        return works

    async def _result(self, accusation: Accusation, deadline_s: float) -> bool | None:
        if _works(accusation):
            return True
        try:
            async with asyncio.timeout(max(0.0, deadline_s - monotonic())):
                done, _ = await asyncio.wait((check := self.check(accusation),))
        except TimeoutError:
            return None
        return None if not done or check.cancelled() else check.result()

    def _judge_later(self, accusation: Accusation) -> None:
        if _works(accusation):
            self._request_at_fault(accusation)
            return
        check = self.check(accusation)
        check.add_done_callback(
            lambda done: self._judge(accusation, None if done.cancelled() else done.result())
        )

    def _doubt(self, accusation: Accusation) -> int:
        """Count a request that endpoints refused alike. How many there were since the last success."""
        load = accusation.load
        if max(load.sampled_s, load.proved_s) > load.doubted_s:
            load.doubts = 0
        load.doubts += 1
        load.doubted_s = monotonic()
        return load.doubts

    # -- verdicts --------------------------------------------------------------------------------

    def _judge(self, accusation: Accusation, works: bool | None) -> None:
        if works is True:
            self._request_at_fault(accusation)
        elif works is False:
            self._endpoint_at_fault(accusation, FAULT_WEIGHT)
        else:
            self._count(accusation)
            accusation.load.breaker.abandoned(monotonic(), accusation.probe)

    def _request_at_fault(self, accusation: Accusation) -> None:
        accusation.load.breaker.abandoned(monotonic(), accusation.probe)
        self._metrics.endpoint_failures.labels(accusation.tier, THE_REQUEST).inc()

    def _endpoint_at_fault(self, accusation: Accusation, weight: int) -> None:
        accusation.load.breaker.failure(monotonic(), accusation.probe, weight)
        self._count(accusation)

    def _count(self, accusation: Accusation) -> None:
        self._metrics.endpoint_failures.labels(accusation.tier, str(accusation.kind)).inc()
        if accusation.retried_at:
            self._metrics.retries.labels(accusation.retried_at, str(accusation.kind)).inc()


def _works(accusation: Accusation) -> bool:
    load = accusation.load
    return monotonic() - max(load.sampled_s, load.proved_s) < PROOF_S
