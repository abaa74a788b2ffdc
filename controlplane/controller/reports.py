"""Reports on the plane: samples are recorded in memory and in the store, and added up on request.

Memory contains the last samples. The store contains all of them, including those of earlier controller
processes, as points that get wider with age. A report takes samples from the store only where they are older
than those in memory. It is made in a thread, and serves all requests until the next sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from controlplane.config.reports import ReportsConfig
from controlplane.controller.controller import Controller
from controlplane.controller.recorder import Recorder
from controlplane.controller.store_reads import STEPS
from controlplane.controller.stored_figures import (
    add_stored,
    add_stored_buckets,
    bucket_values,
    series_of,
)
from controlplane.core.reports.report import (
    GAUGES,
    MAX_WINDOW_MINUTES,
    MIN_WINDOW_MINUTES,
    SUMS,
    Instance,
    InstanceKind,
    InstanceReport,
    PlaneReport,
    ReportSample,
    Totals,
    plane_report,
    track_step_s,
)
from controlplane.core.reports.ring_buffer import ReportRing, SampleRound, tally
from controlplane.core.reports.sampler import ReportSampler

MAX_CACHED = 16
"""Windows whose reports are cached until the next sample."""
JOIN_SLACK_S = 60
"""Points this close to the age at which they are joined count as joined."""

log = structlog.stdlib.get_logger(__name__)


class Reports:
    """One event loop owns it, and calls :meth:`tick` every second or so."""

    def __init__(
        self, controller: Controller, recorder: Recorder, settings: ReportsConfig, cost_per_gpu_hour: float
    ) -> None:
        self._controller = controller
        self._recorder = recorder
        self._settings = settings
        self._cost_per_gpu_hour = cost_per_gpu_hour
        self._sampler = ReportSampler()
        self.ring = ReportRing(settings.samples)
        self._sampled_s = self._logged_s = controller.now_s()
        self._cached: dict[float, PlaneReport] = {}
        self._making = asyncio.Lock()
        self._logging: asyncio.Task[None] | None = None

    def tick(self) -> None:
        """Record which instances can serve; when it is time, take a sample and write a report to the log."""
        now_s = self._controller.now_s()
        if not self._controller.may_decide:
            self._sampler.reset()
            self._sampled_s = now_s
            return
        cluster = self._controller.sampled_cluster()
        self._sampler.watch(cluster, now_s)
        if now_s - self._sampled_s >= self._settings.interval_s:
            self._sampled_s = now_s
            self._add(self._sampler.sample(cluster, now_s))
        if now_s - self._logged_s >= self._settings.log_interval_s:
            self._logged_s = now_s
            self._logging = asyncio.get_running_loop().create_task(self._log())

    async def report(self, window_minutes: float) -> PlaneReport:
        """The plane over the last minutes. ValueError if the window is too short or too long."""
        if not MIN_WINDOW_MINUTES <= window_minutes <= MAX_WINDOW_MINUTES:
            raise ValueError(
                f"a window of {window_minutes:g} min: reports look back on {MIN_WINDOW_MINUTES:g} to "
                f"{MAX_WINDOW_MINUTES:g} minutes"
            )
        async with self._making:
            report = self._cached.get(window_minutes)
            if report is None:
                tiers = {spec.name: spec.attainment for spec in self._controller.tiers}
                present = list(self._controller.endpoints)
                report = await asyncio.to_thread(
                    self._make, window_minutes * 60, self.ring.rounds, self._unix_s(), tiers, present
                )
                if len(self._cached) >= MAX_CACHED:
                    self._cached.clear()
                self._cached[window_minutes] = report
            return report

    def _unix_s(self) -> float:
        """Wall-clock time that does not jump with the wall clock."""
        return self._controller.now_s() + self._controller.shift_s

    def _add(self, samples: dict[Instance, ReportSample]) -> None:
        if not samples:
            return
        self._cached = {}
        unix_s = int(self._unix_s())
        self.ring.add(SampleRound.of(unix_s, samples))
        values: dict[str, float] = {}
        for instance, sample in samples.items():
            values |= {series_of(instance, name): value for name, value in stored_figures(sample)}
            if instance.kind is InstanceKind.TIER:
                values |= bucket_values(instance.tier, sample)
        self._recorder.add_points(unix_s, values)

    def _make(
        self,
        window_s: float,
        rounds: Sequence[SampleRound],
        now_unix_s: float,
        tiers: Mapping[str, float | None],
        present: Sequence[str],
    ) -> PlaneReport:
        until_s = int(now_unix_s) + 1
        from_s, step_s = until_s - int(window_s), track_step_s(window_s)
        memory_s = max(from_s, _memory_from_s(rounds[0].unix_s, until_s)) if rounds else until_s
        recent = [each for each in rounds if memory_s <= each.unix_s < until_s]
        totals = {key: found for (key, _), found in tally(recent, lambda instance: instance).items()}
        tracks: dict[str, dict[int, Totals]] = {}
        for (tier, part), found in tally(
            recent, _tier_of, lambda each: (each.unix_s - from_s) // step_s
        ).items():
            tracks.setdefault(tier, {})[part] = found
        if from_s < memory_s:
            until = min(memory_s, until_s)
            add_stored(self._recorder.store.summary, totals, tracks, from_s, until, step_s, int(window_s) + 1)
        add_stored_buckets(self._recorder.store.summary, totals, from_s, until_s, int(window_s) + 1)
        return plane_report(
            totals,
            tracks,
            tiers=tiers,
            present=present,
            from_unix_s=from_s,
            until_unix_s=until_s,
            step_s=step_s,
            cost_per_gpu_hour=self._cost_per_gpu_hour,
        )

    async def _log(self) -> None:
        minutes = self._settings.log_interval_s / 60
        try:
            report = await self.report(minutes)
        except Exception as error:
            log.exception("the report for the log failed", error=repr(error))
            return
        for tier in report.tiers:
            if not tier.gone:
                log.info("report", window_minutes=minutes, tier=tier.tier, **log_figures(tier))


def stored_figures(sample: ReportSample) -> list[tuple[str, float]]:
    """The figures of a sample that are stored: sums that are 0 and gauges that are unknown are left out."""
    figures = [(name, getattr(sample, name)) for name in (*SUMS, *GAUGES)]
    return [(name, value) for name, value in figures if value or (value is not None and name in GAUGES)]


def log_figures(tier: InstanceReport) -> dict[str, float]:
    """The figures of a line in the log; unknown ones are left out."""
    values = {
        "requests": round(tier.requests),
        "requests_per_s": tier.requests_per_s,
        "latency_mean_ms": tier.latency_mean_ms,
        "latency_p50_ms": tier.latency_p50_ms,
        "latency_p99_ms": tier.latency_p99_ms,
        "latency_max_ms": tier.latency_max_ms,
        "slo_attainment": tier.attainment,
        "slo_target": tier.slo_target,
        "availability": tier.availability,
        "queue_mean": tier.queue_mean,
        "queue_max": tier.queue_max,
        "gpu_ratio": tier.gpu_ratio,
        "tokens": round(tier.prompt_tokens + tier.generated_tokens),
        "errors": round(tier.errors),
        "resumed": round(tier.resumed),
        "spilled": round(tier.spilled),
        "gpu_hours": tier.gpu_hours,
        "cost": tier.cost,
    }
    return {name: round(value, 4) for name, value in values.items() if value is not None}


def _memory_from_s(oldest_s: int, now_s: int) -> int:
    """The time from which samples are taken from memory: it must not lie inside a point of the store that
    joins several samples."""
    age_s = now_s - oldest_s + JOIN_SLACK_S
    step_s = next((step_s for step_s, max_age_s in STEPS if age_s < max_age_s), STEPS[-1][0])
    return -(-oldest_s // step_s) * step_s


def _tier_of(instance: Instance) -> str | None:
    return instance.tier if instance.kind is InstanceKind.TIER else None
