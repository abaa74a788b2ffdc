"""How tiers grow and shrink: SLO, bounds, schedules, and what the controller does about them."""

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
"""Replicas that advice may go up to where a tier sets no bounds."""


_EVERY_DAY: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class SloConfig(Strict):
    """What the requests of a tier are promised; reports, alerts and scaling go by it."""

    ttft_s: Positive = 3.0
    """Time to the first token."""
    itl_s: Positive = 0.2
    """Time per token after it, the mean of one request."""
    total_s: Positive | None = None
    """From arrival to the end of the answer; by default not limited."""
    attainment: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """The share of requests that must get all of it."""

    def slo(self) -> Slo:
        """As the core has it."""
        total_s = math.inf if self.total_s is None else self.total_s
        return Slo(self.ttft_s, self.itl_s, self.attainment, total_s)


class ScheduleConfig(Strict):
    """Other bounds at some times of the week."""

    start: str
    """A time of day such as ``08:30``."""
    end: str
    """A time of day; before ``start``, it is on the next day."""
    days: Annotated[list[Day], Field(min_length=1)] = Field(default_factory=lambda: list(_EVERY_DAY))
    """The days on which it starts."""
    min_replicas: Count | None = None
    """Ready when it begins: they are started a cold start earlier."""
    max_replicas: Count | None = None
    """Obeyed when it begins."""
    utc_offset_hours: Annotated[float, Field(ge=-14, le=14)] = 0.0
    """Of the clock that the times are meant by."""

    @field_validator("start", "end")
    @classmethod
    def _time(cls, value: str) -> str:
        try:
            clock_s(value)
        except ValueError as error:
            raise FindingsError([ConfigFinding((), str(error), "write it as HH:MM")]) from None
        return value

    def findings(self) -> list[ConfigFinding]:
        """What doesn't fit together."""
        if self.min_replicas is None and self.max_replicas is None:
            return [
                ConfigFinding(("min_replicas",), "this schedule changes nothing", "set it or max_replicas")
            ]
        return []

    def schedule(self) -> Schedule:
        """As the core has it."""
        return Schedule(
            clock_s(self.start),
            clock_s(self.end),
            tuple(DAYS.index(day) for day in self.days),
            self.min_replicas,
            self.max_replicas,
            round(self.utc_offset_hours * 3600),
        )


class ScalingConfig(Strict):
    """Between which numbers of replicas a tier may be, and how fast it gets there."""

    min_replicas: Count = 1
    """0: the last replica goes after ``idle_to_zero_s``; the next request waits for a new one, or a neighbour
    bridges it."""
    max_replicas: Annotated[int, Field(ge=1)] = DEFAULT_MAX
    """At most so many, whatever is asked for."""
    priority: int = 0
    """Where ``controller.scaling.gpus`` does not suffice, the higher goes first."""
    step_up: Annotated[int, Field(ge=1)] | None = None
    """Replicas added at once at most; by default as many as are needed."""
    step_down: Annotated[int, Field(ge=1)] | None = None
    """Replicas taken at once at most."""
    cool_down_up_s: NonNegative = 0.0
    """Between two orders of more."""
    cool_down_down_s: NonNegative = 0.0
    """Between any order and one of fewer."""
    hold_s: NonNegative | None = None
    """How long fewer must be enough before replicas go; by default one cold start and half a minute."""
    cold_start_s: Positive | None = None
    """From the order of a replica until it answers; by default as it was measured last, and a minute at
    first."""
    idle_to_zero_s: Positive = 600.0
    """With ``min_replicas`` 0: no request for so long and the last replica goes."""
    schedules: list[ScheduleConfig] = Field(default_factory=list)
    """Other bounds at some times of the week."""

    def findings(self) -> list[ConfigFinding]:
        """What doesn't fit together."""
        found = []
        if self.min_replicas > self.max_replicas:
            remedy = f"lower it to {self.max_replicas}, or raise max_replicas"
            message = f"{self.min_replicas} is over max_replicas, {self.max_replicas}"
            found.append(ConfigFinding(("min_replicas",), message, remedy, ("max_replicas",)))
        for i, schedule in enumerate(self.schedules):
            if (schedule.min_replicas or 0) > self.max_replicas:
                message = f"{schedule.min_replicas} is over the tier's max_replicas, {self.max_replicas}"
                found.append(ConfigFinding(("schedules", i, "min_replicas"), message, "lower it"))
        return found


class ThresholdsConfig(Strict):
    """When a figure of the last minutes is a reason for advice."""

    gpu_ratio: Ratio = 0.95
    """Utilisation of a tier's busiest GPU, above."""
    memory_ratio: Ratio = 0.98
    """Memory of a tier's fullest GPU, above; vLLM takes ``gpu-memory-utilization`` of it at its start."""
    kv_ratio: Ratio = 0.95
    """KV cache of a tier's fullest engine, above."""
    latency_ms: Positive | None = None
    """95th percentile of whole answers, above. By default a tier that is given an ``slo`` goes by that, and
    the others by 3000."""
    queue: NonNegative = 50.0
    """Requests that wait for a tier, above."""
    error_ratio: Ratio = 0.10
    """Share of requests that fail, above."""
    idle_ratio: Ratio = 0.20
    """Utilisation below, together with …"""
    idle_requests_per_s: NonNegative = 1.0
    """… less than this: idle."""

    def thresholds(self) -> Thresholds:
        """As the core has them."""
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
    """What the controller does about load."""

    mode: Literal["advise", "apply"] = "advise"
    """``advise``: targets and recommendations are only shown. ``apply``: tiers with ``scaling`` follow
    them."""
    tick_s: Positive = 5.0
    """How often targets are worked out."""
    advice_interval_s: Positive = 300.0
    """How often recommendations are given; at once when a threshold is newly passed."""
    window_s: Annotated[float, Field(ge=10, le=3600)] = 300.0
    """The minutes that recommendations look back on."""
    score_after_s: Positive = 600.0
    """A recommendation is judged by what happened after so long."""
    gpus: Positive | None = None
    """GPUs that all tiers share; by default as many as there are."""
    cost_per_gpu_hour: NonNegative = 0.0
    """For the costs in reports."""
    thresholds: ThresholdsConfig = ThresholdsConfig()
    """When a figure is a reason for advice."""

    def recommendation_rules(self) -> RecommendationRules:
        """As the core has them."""
        return RecommendationRules(self.thresholds.thresholds(), self.advice_interval_s, self.score_after_s)
