"""Settings of scaling: SLOs, bounds on replicas, schedules, targets and recommendations."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from controlplane.config.strict import ConfigFinding, FindingsError, Strict
from controlplane.core.autoscaling.schedules import DAYS, Schedule, clock_s
from controlplane.core.domain.slo import Slo
from controlplane.core.recommendations.cycle import RecommendationRules
from controlplane.core.recommendations.rules import Thresholds

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

DEFAULT_MAX: Final = 10
"""The most replicas that a tier without bounds of its own may be recommended."""

_EVERY_DAY: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class SloConfig(Strict):
    """The service-level objective of a tier's requests; reports, alerts and scaling use it."""

    ttft_s: Positive = 3.0
    """Time to first token."""
    itl_s: Positive = 0.2
    """Time per token after the first, averaged over one request."""
    total_s: Positive | None = None
    """Time from arrival to the end of the response; unlimited by default."""
    attainment: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of requests that must meet all of these limits."""

    def slo(self) -> Slo:
        """The SLO as the core takes it."""
        total_s = math.inf if self.total_s is None else self.total_s
        return Slo(ttft_s=self.ttft_s, itl_s=self.itl_s, attainment=self.attainment, total_s=total_s)


class ScheduleConfig(Strict):
    """Other bounds on replicas at certain times of the week."""

    start: str
    """The time of day at which it starts, such as ``08:30``."""
    end: str
    """The time of day at which it ends; if before ``start``, on the next day."""
    days: Annotated[list[Day], Field(min_length=1)] = Field(default_factory=lambda: list(_EVERY_DAY))
    """The days on which it starts."""
    min_replicas: Count | None = None
    """At least this many replicas; they are ready at ``start``, because they are started one cold start
    earlier."""
    max_replicas: Count | None = None
    """At most this many replicas, from ``start``."""
    utc_offset_hours: Annotated[float, Field(ge=-14, le=14)] = 0.0
    """The time zone of ``start`` and ``end``, as hours ahead of UTC."""

    @field_validator("start", "end")
    @classmethod
    def _time(cls, value: str) -> str:
        try:
            clock_s(value)
        except ValueError as error:
            raise FindingsError([ConfigFinding((), str(error), "write it as HH:MM")]) from None
        return value

    def findings(self) -> list[ConfigFinding]:
        """A finding if the schedule sets no bound."""
        if self.min_replicas is None and self.max_replicas is None:
            remedy = "set min_replicas or max_replicas"
            return [ConfigFinding(("min_replicas",), "this schedule changes nothing", remedy)]
        return []

    def schedule(self) -> Schedule:
        """The schedule as the core takes it."""
        return Schedule(
            start_s=clock_s(self.start),
            end_s=clock_s(self.end),
            days=tuple(DAYS.index(day) for day in self.days),
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            utc_offset_s=round(self.utc_offset_hours * 3600),
        )


class ScalingConfig(Strict):
    """The bounds on a tier's number of replicas, and how fast it may change."""

    min_replicas: Count = 1
    """At least this many replicas. With 0 the last replica is stopped after ``idle_to_zero_s`` without a
    request; the next request then waits for a new replica, or a neighbouring tier bridges."""
    max_replicas: Annotated[int, Field(ge=1)] = DEFAULT_MAX
    """At most this many replicas, also when the number is set manually."""
    priority: int = 0
    """When ``controller.scaling.gpus`` is too small for all tiers, those with a higher priority get GPUs
    first."""
    step_up: Annotated[int, Field(ge=1)] | None = None
    """The most replicas that are added at once; by default as many as are needed."""
    step_down: Annotated[int, Field(ge=1)] | None = None
    """The most replicas that are removed at once; by default all that are not needed."""
    cool_down_up_s: NonNegative = 0.0
    """The shortest time between two increases of the target."""
    cool_down_down_s: NonNegative = 0.0
    """The shortest time between any change of the target and a decrease."""
    hold_s: NonNegative | None = None
    """Replicas are removed only after fewer have been enough for this long; by default one cold start plus 30
    seconds."""
    cold_start_s: Positive | None = None
    """Time from requesting a replica until it serves; by default as last measured, and one minute until there
    is a measurement."""
    idle_to_zero_s: Positive = 600.0
    """With ``min_replicas`` 0: the last replica is stopped after this long without a request."""
    schedules: list[ScheduleConfig] = Field(default_factory=list)
    """Other bounds at certain times of the week."""

    def findings(self) -> list[ConfigFinding]:
        """Bounds that contradict each other."""
        found = []
        if self.min_replicas > self.max_replicas:
            remedy = f"lower it to {self.max_replicas}, or raise max_replicas"
            message = f"{self.min_replicas} is above max_replicas, {self.max_replicas}"
            found.append(ConfigFinding(("min_replicas",), message, remedy, ("max_replicas",)))
        for i, schedule in enumerate(self.schedules):
            if (schedule.min_replicas or 0) > self.max_replicas:
                message = f"{schedule.min_replicas} is above the tier's max_replicas, {self.max_replicas}"
                remedy = f"lower it to {self.max_replicas}, or raise the tier's max_replicas"
                found.append(ConfigFinding(("schedules", i, "min_replicas"), message, remedy))
        return found


class ThresholdsConfig(Strict):
    """Limits on the metrics of the last ``window_s``; crossing one is a reason for a recommendation."""

    gpu_ratio: Ratio = 0.95
    """Upper limit on the utilisation of a tier's busiest GPU."""
    memory_ratio: Ratio = 0.98
    """Upper limit on the memory use of a tier's fullest GPU; vLLM takes ``gpu-memory-utilization`` of the
    memory when it starts."""
    kv_ratio: Ratio = 0.95
    """Upper limit on the KV cache use of a tier's fullest engine."""
    latency_ms: Positive | None = None
    """Upper limit on the 95th percentile of the time to a complete response. By default the limit follows
    from the tier's ``slo`` if the configuration sets it, and is 3000 otherwise."""
    queue: NonNegative = 50.0
    """Upper limit on the number of requests that wait for a tier."""
    error_ratio: Ratio = 0.10
    """Upper limit on the share of requests that fail."""
    idle_ratio: Ratio = 0.20
    """A tier is idle if its GPU utilisation is below this and it gets fewer requests than
    ``idle_requests_per_s``."""
    idle_requests_per_s: NonNegative = 1.0
    """See ``idle_ratio``."""

    def thresholds(self) -> Thresholds:
        """The thresholds as the core takes them."""
        return Thresholds(
            gpu_ratio=self.gpu_ratio,
            memory_ratio=self.memory_ratio,
            latency_ms=self.latency_ms,
            queue=self.queue,
            kv_ratio=self.kv_ratio,
            error_ratio=self.error_ratio,
            idle_gpu_ratio=self.idle_ratio,
            idle_requests_per_s=self.idle_requests_per_s,
        )


class ControllerScalingConfig(Strict):
    """How the controller scales tiers and makes recommendations."""

    mode: Literal["advise", "apply"] = "advise"
    """``advise``: targets and recommendations are only shown. ``apply``: the number of replicas of tiers with
    ``scaling`` follows the targets."""
    tick_s: Positive = 5.0
    """How often targets are computed."""
    advice_interval_s: Positive = 300.0
    """How often recommendations are made; also at once when a threshold is crossed."""
    window_s: Annotated[float, Field(ge=10, le=3600)] = 300.0
    """The most recent period, whose metrics recommendations are based on."""
    score_after_s: Positive = 600.0
    """How long after a recommendation its predicted effect is compared with what happened."""
    gpus: Positive | None = None
    """The number of GPUs that all tiers share; by default all GPUs of the cluster."""
    cost_per_gpu_hour: NonNegative = 0.0
    """The price of a GPU-hour, for the costs in reports."""
    thresholds: ThresholdsConfig = ThresholdsConfig()
    """Limits that are a reason for a recommendation when they are crossed."""

    def recommendation_rules(self) -> RecommendationRules:
        """The settings of recommendations as the core takes them."""
        return RecommendationRules(self.thresholds.thresholds(), self.advice_interval_s, self.score_after_s)
