"""The model of engine ``simulated`` has the same timing as the engine itself."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable
from typing import Any, cast

import pytest

from controlplane.config import TierConfig
from controlplane.core.domain.request import RequestShape
from controlplane.engines.simulated import batching
from controlplane.engines.simulated.batching import BatchScheduler, Finish, GenerationRequest
from controlplane.engines.simulated.engine import SimulatedSettings
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.engine import EngineJob, VirtualEngine
from controlplane.simulation.options import Options
from controlplane.simulation.tier_engines import anywhere

Load = list[tuple[float, int, int]]
"""(arrival, prompt tokens, answer tokens)."""
Times = list[tuple[float, float]]
"""(first token, end) after the arrival."""


class Timer:
    """A callback that can be called off."""

    def __init__(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.call: Callable[..., None] | None = call
        self.arguments = arguments

    def cancel(self) -> None:
        self.call = None


class Loop:
    """As much of an event loop as the engine uses, in virtual time."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def call_later(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> Timer:
        timer = Timer(call, arguments)
        self.clock.at(self.clock.now_s + delay_s, self._run, timer)
        return timer

    def call_soon(self, call: Callable[..., None], *arguments: Any) -> Timer:
        return self.call_later(0.0, call, *arguments)

    def _run(self, timer: Timer) -> None:
        if timer.call is not None:
            timer.call(*timer.arguments)


class Reader:
    """When an answer's first token and its end came."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.first_s: float | None = None
        self.done_s: float | None = None

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        if self.first_s is None:
            self.first_s = self.clock.now_s
        if finish is not None:
            self.done_s = self.clock.now_s

    def truncate(self) -> None:
        raise AssertionError("nothing is cut here")


def engine_times(settings: SimulatedSettings, load: Load, patch: pytest.MonkeyPatch) -> Times:
    """The engine's scheduler, in virtual time."""
    clock = VirtualClock()
    patch.setattr(batching, "monotonic", lambda: clock.now_s)
    scheduler = BatchScheduler(cast(asyncio.AbstractEventLoop, Loop(clock)), settings)
    readers = []
    for at_s, prompt, answer in load:
        clock.run_until(at_s)
        readers.append(Reader(clock))
        scheduler.submit(GenerationRequest(range(prompt), max_tokens=answer, ignore_eos=True), readers[-1])
    clock.run_until(load[-1][0] + 3600.0)
    return since(load, [(reader.first_s, reader.done_s) for reader in readers])


def model_times(settings: SimulatedSettings, load: Load) -> Times:
    """The simulator's model of a tier with these settings."""
    tier = TierConfig(name="t", engine="simulated", engine_args=settings.model_dump(exclude_defaults=True))
    model = anywhere(tier, Options(), RequestShape(400.0, 60.0)).engine
    clock = VirtualClock()
    done_s: dict[EngineJob, float] = {}
    engine = VirtualEngine(
        clock,
        model.timing,
        max_sequences=model.max_sequences,
        kv_tokens=model.kv_tokens,
        on_first=lambda job: None,
        on_done=lambda job: done_s.update({job: clock.now_s}),
    )
    jobs = []
    for at_s, prompt, answer in load:
        clock.run_until(at_s)
        # All prompts have the same prefix: a prefix cache would find it.
        jobs.append(EngineJob(prompt, answer, (1,), None))
        engine.submit(jobs[-1])
    clock.run_until(load[-1][0] + 3600.0)
    return since(load, [(job.first_s, done_s.get(job)) for job in jobs])


def since(load: Load, moments: list[tuple[float | None, float | None]]) -> Times:
    times = []
    for (at_s, _, _), (first_s, done_s) in zip(load, moments, strict=True):
        assert first_s is not None
        assert done_s is not None
        times.append((first_s - at_s, done_s - at_s))
    return times


def drawn(rate_per_s: float, seed: int, count: int = 300) -> Load:
    rng, at_s, load = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate_per_s)
        load.append((at_s, rng.randint(1, 800), rng.randint(1, 120)))
    return load


@pytest.mark.parametrize("rate_per_s", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(
    "settings",
    [
        SimulatedSettings(ttft_ms=40, itl_ms=8),
        SimulatedSettings(ttft_ms=90, itl_ms=15, prefill_tokens_per_s=2000),
        SimulatedSettings(ttft_ms=250, itl_ms=30, batch_slowdown=0.1),
        SimulatedSettings(ttft_ms=500, itl_ms=10, batch_slowdown=0.2),
        SimulatedSettings(ttft_ms=50, itl_ms=20, batch_slowdown=0.05, max_running=4),
        SimulatedSettings(ttft_ms=40, itl_ms=20, prefill_tokens_per_s=3000, kv_cache_tokens=900),
    ],
)
def test_the_model_has_the_timing_of_the_engine(
    settings: SimulatedSettings, rate_per_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = drawn(rate_per_s, 3)
    real, model = engine_times(settings, load, monkeypatch), model_times(settings, load)
    for number in (0, 1):
        took, predicted = ([times[number] for times in run] for run in (real, model))
        assert statistics.fmean(predicted) == pytest.approx(statistics.fmean(took), rel=0.01)
        for one, other in zip(took, predicted, strict=True):
            # The engine reads the number of running requests once per token, the model continuously.
            assert other == pytest.approx(one, rel=0.05, abs=3 * settings.itl_ms / 1000)
