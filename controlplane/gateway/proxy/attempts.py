"""Begins attempts, accounts for them, and decides what follows a failed one."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final, NamedTuple

from controlplane.config import GatewayConfig
from controlplane.core.routing.dispatcher import Started
from controlplane.core.routing.retry import (
    RULES,
    AttemptFailure,
    FailedAttempt,
    GiveUp,
    RetryBudget,
    RetrySettings,
    next_step,
)
from controlplane.errors import DeadlineExceeded, EngineRefused, RequestError
from controlplane.gateway.proxy.attempt import HOLD_S, Attempt
from controlplane.gateway.proxy.connections import ConnectionTable
from controlplane.gateway.proxy.dispatch import RequestDispatch, give_up_error
from controlplane.gateway.proxy.timeouts import TimeoutWatcher
from controlplane.gateway.proxy.upstream import UpstreamFailure
from controlplane.gateway.proxy.verdicts import Verdicts
from controlplane.gateway.request_context import RequestContext
from controlplane.gateway.stream_usage import ReportedUsage
from controlplane.gateway.telemetry.accounting import UsageLedger
from controlplane.gateway.telemetry.metrics import Metrics

ACCUSATIONS: Final = frozenset({AttemptFailure.SERVER_ERROR, AttemptFailure.STREAM_ERROR})
"""Failures with an error of the engine's own, for which the request may be to blame: until its first token.
An engine that fails after tokens has accepted the request."""
TOO_LATE: Final = "the request's deadline passed before its response was complete"


class TokenCounts(NamedTuple):
    """The tokens of a finished request."""

    prompt: int
    generated: int


NO_TOKENS: Final = TokenCounts(0, 0)


class Attempts:
    """The attempts of one gateway replica's requests."""

    def __init__(
        self,
        config: GatewayConfig,
        dispatch: RequestDispatch,
        connections: ConnectionTable,
        metrics: Metrics,
        ledger: UsageLedger,
        timeouts: TimeoutWatcher,
    ) -> None:
        self._dispatch = dispatch
        self._connections = connections
        self._metrics = metrics
        self._ledger = ledger
        self._timeouts = timeouts
        self._settings = RetrySettings(
            max_attempts=config.retry.max_attempts,
            budget_ratio=config.retry.budget_ratio,
            budget_min_per_s=config.retry.budget_min_per_s,
        )
        self.budget = RetryBudget(self._settings, monotonic())
        self.verdicts = Verdicts(metrics)

    def begin(self, context: RequestContext, started: Started) -> Attempt:
        """Begin an attempt in a slot that was taken for it. Raises ValueError if the endpoint's address is
        invalid."""
        slot = started.slot
        context.attempts += 1
        context.tried |= {slot.load.key}
        try:
            upstream = self._connections.to(slot.load)
        except ValueError:
            slot.abandon(monotonic())
            raise
        return Attempt(context, slot, upstream, self._timeouts, self._dispatch.pump)

    def finished(
        self,
        context: RequestContext,
        attempt: Attempt,
        usage: ReportedUsage,
        estimate: TokenCounts = NO_TOKENS,
    ) -> None:
        """Account for the tokens and the GPU time of a request whose last attempt succeeded. ``estimate`` has
        the tokens that the engine did not report."""
        if context.accusations is not None:
            self.verdicts.answered(context, attempt)
        self.count(context, attempt.load.endpoint.tier, usage, estimate)

    def count(
        self, context: RequestContext, tier: str, usage: ReportedUsage, estimate: TokenCounts = NO_TOKENS
    ) -> None:
        """Account for the tokens and the GPU time of a request that ``tier`` has served."""
        if usage.wrong:
            self._metrics.wrong_usage.labels(tier).inc()
        prompt = estimate.prompt if usage.prompt is None else usage.prompt
        generated = estimate.generated if usage.generated is None else usage.generated
        owner = context.caller
        next_gpu_s = self._ledger.record(tier, owner, context.session, prompt, generated, context.gpu_s)
        context.next_gpu_s = next_gpu_s
        self._metrics.used(context, tier, prompt, generated, next_gpu_s)

    def failed(self, attempt: Attempt, failure: UpstreamFailure) -> None:
        """Account for a failed attempt and release its slot."""
        kind = failure.kind
        if kind is None:  # the deadline passed, which says nothing about the endpoint
            attempt.abandon()
        elif kind is AttemptFailure.GATEWAY:
            attempt.abandon()
            return  # nor does the gateway's own trouble
        elif kind is AttemptFailure.BUSY or kind is AttemptFailure.UNAVAILABLE:
            attempt.hold(HOLD_S if failure.retry_after_s is None else failure.retry_after_s)
        elif failure.report is not None and kind in ACCUSATIONS and not attempt.slot.first_token_came:
            self.verdicts.accuse(attempt, failure, kind)
            return  # counted with the verdict
        else:
            attempt.fail(RULES[kind].breaker_weight)
        name = str(kind) if kind is not None else "deadline"
        self._metrics.endpoint_failures.labels(attempt.load.endpoint.tier, name).inc()

    async def retry_or_raise(self, context: RequestContext, failure: UpstreamFailure, *, sent: bool) -> None:
        """Return when the next attempt is due, or raise the error for the client if no attempt follows.
        ``sent`` means that part of the response has reached the client."""
        kind = failure.kind
        if kind is None:
            raise DeadlineExceeded(TOO_LATE)
        attempt = FailedAttempt(
            number=context.attempts,
            sent=sent,
            deadline_s=context.deadline_s,
            refused=context.refused,
            losses=context.losses,
            engine_status=failure.status,
            alike=context.accusations is not None and self.verdicts.alike(context),
        )
        step = next_step(kind, attempt, self._settings, self.budget, monotonic())
        context.refused += kind is AttemptFailure.REFUSED
        context.losses += RULES[kind].lost
        if isinstance(step, GiveUp):
            raise await self.last_error(context, failure, step, alike=attempt.alike)
        if sent:
            self.retried(context, context.tier, failure)
        if step.pause_s:
            await asyncio.sleep(step.pause_s)

    def retried(self, context: RequestContext, tier: str, failure: UpstreamFailure) -> None:
        """Count the attempt that follows a failure at ``tier``; if the request itself may be to blame for the
        failure, only with the verdict."""
        accusations = context.accusations
        if accusations is not None and accusations[-1].failure is failure:
            accusations[-1].retried_at = tier
        else:
            self._metrics.retries.labels(tier, str(failure.kind)).inc()

    async def last_error(
        self,
        context: RequestContext,
        failure: UpstreamFailure,
        step: GiveUp | None = None,
        *,
        alike: bool = False,
    ) -> RequestError:
        """The client's error for a request that is given up after this failure. Without ``step``, no other
        endpoint is left to try."""
        kind = failure.kind
        if kind is None:
            return DeadlineExceeded(TOO_LATE)
        report = failure.report
        refused = kind is AttemptFailure.INVALID
        if report is not None and not refused and context.accusations is not None:
            refused = await self.verdicts.request_at_fault(context, alike=alike)
        if refused and report is not None:
            return EngineRefused(
                report.message,
                status=report.status or RULES[kind].status,
                kind=report.kind,
                code=report.code,
                param=report.param,
            )
        if step is None:
            rule = RULES[kind]
            step = GiveUp(failure.status or rule.status, rule.code, f"{kind}, and no other endpoint is left")
        return give_up_error(step, failure)
