"""The simulated engine: batching, KV cache, prefix cache, failures and its meter."""

from __future__ import annotations

import pytest

from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.engine import (
    EngineJob,
    EngineTiming,
    SimulatedTiming,
    VirtualEngine,
)
from controlplane.simulation.trace_rows import BLOCK_TOKENS


class Steady:
    """10 ms a step and 1 ms for each sequence, 0.1 ms a prompt token."""

    parallel_prompts = False
    kv_bound = True

    def prompt_s(self, tokens: int) -> float:
        return tokens * 1e-4

    def step_s(self, batch: float, context: float) -> float:
        return 0.010 + 0.001 * batch


class Bench:
    def __init__(
        self, *, timing: EngineTiming | None = None, kv_tokens: float = 1e9, max_sequences: int = 100
    ) -> None:
        self.clock = VirtualClock()
        self.done: list[EngineJob] = []
        self.done_s: dict[EngineJob, float] = {}
        self.engine = VirtualEngine(
            self.clock,
            timing or Steady(),
            max_sequences=max_sequences,
            kv_tokens=kv_tokens,
            on_first=lambda job: None,
            on_done=self._on_done,
        )

    def _on_done(self, job: EngineJob) -> None:
        self.done.append(job)
        self.done_s[job] = self.clock.now_s

    def submit(self, prompt: int, answer: int, blocks: tuple[int, ...] | None = None) -> EngineJob:
        job = EngineJob(prompt, answer, blocks, None)
        self.engine.submit(job)
        return job


def test_a_single_request_takes_its_prompt_and_its_steps() -> None:
    bench = Bench()
    job = bench.submit(1000, 51)
    bench.clock.run_until(100.0)
    assert job.first_s == pytest.approx(0.1)
    assert bench.done_s[job] == pytest.approx(0.1 + 50 * 0.011)


def test_two_requests_share_each_step() -> None:
    bench = Bench()
    first, second = bench.submit(1000, 101), bench.submit(1000, 101)
    bench.clock.run_until(100.0)
    assert second.first_s == pytest.approx(0.2)
    # The second prompt carries one token of the first request; then both advance together.
    assert bench.done_s[first] == pytest.approx(0.2 + 99 * 0.012)
    assert bench.done_s[second] == pytest.approx(bench.done_s[first] + 0.011)


def test_prompts_of_a_parallel_engine_do_not_wait_for_each_other() -> None:
    bench = Bench(timing=SimulatedTiming(0.1, 0.01))
    jobs = [bench.submit(10, 11) for _ in range(5)]
    bench.clock.run_until(10.0)
    assert [job.first_s for job in jobs] == [pytest.approx(0.1)] * 5
    assert [bench.done_s[job] for job in jobs] == [pytest.approx(0.2)] * 5


def test_requests_beyond_the_maximum_of_sequences_wait_in_its_queue() -> None:
    bench = Bench(max_sequences=2)
    for _ in range(3):
        bench.submit(100, 50)
    assert bench.engine.running == 1
    assert len(bench.engine.waiting) == 2
    bench.clock.run_until(0.05)
    assert (bench.engine.running, len(bench.engine.waiting)) == (2, 1)
    bench.clock.run_until(50.0)
    assert len(bench.done) == 3


def test_a_full_cache_preempts_the_youngest_and_all_requests_end() -> None:
    bench = Bench(kv_tokens=1500)
    jobs = [bench.submit(400, 400) for _ in range(3)]
    bench.clock.run_until(500.0)
    assert sorted(map(id, bench.done)) == sorted(map(id, jobs))
    assert any(job.computed_tokens > 400 for job in jobs), "a preempted prompt is computed again"
    assert bench.done[0] is jobs[0]
    assert all(job.generated_tokens == 400 for job in jobs)
    assert bench.engine.kv_usage_ratio == 0.0


def test_a_request_larger_than_the_cache_is_served_alone() -> None:
    bench = Bench(kv_tokens=100)
    bench.submit(500, 20)
    bench.submit(10, 20)
    bench.clock.run_until(100.0)
    assert len(bench.done) == 2


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench()
    blocks = (1, 2, 3)
    first = bench.submit(3 * BLOCK_TOKENS + 100, 2, blocks)
    bench.clock.run_until(10.0)
    second = bench.submit(3 * BLOCK_TOKENS + 100, 2, blocks)
    other = bench.submit(3 * BLOCK_TOKENS + 100, 2, (9, 2, 3))
    bench.clock.run_until(20.0)
    assert first.computed_tokens == 3 * BLOCK_TOKENS + 100
    assert second.computed_tokens == 100
    assert other.computed_tokens == first.computed_tokens


def test_a_dead_engine_returns_all_its_jobs_and_reports_nothing_more() -> None:
    bench = Bench(max_sequences=3)
    jobs = [bench.submit(1000, 500) for _ in range(5)]
    bench.clock.run_until(0.25)
    lost = bench.engine.kill()
    assert sorted(map(id, lost)) == sorted(map(id, jobs))
    bench.clock.run_until(1000.0)
    assert bench.done == []


def test_the_meter_counts_the_work() -> None:
    bench = Bench()
    for _ in range(4):
        bench.submit(200, 30)
    bench.clock.run_until(60.0)
    meter = bench.engine.read()
    assert meter.generated_tokens == pytest.approx(120, abs=1)
    assert meter.prompt_tokens == 800
    assert 0 < meter.busy_s < 60
    assert bench.engine.read().generated_tokens == 0


def test_worked_time_is_the_sum_of_the_meters_and_reading_it_changes_nothing() -> None:
    observed, bench = Bench(), Bench()
    for each in (observed, bench):
        each.submit(1000, 51)
    assert observed.engine.worked_s == 0.0
    read_s = 0.0
    for step in range(1, 40):
        observed.clock.run_until(step * 0.05)
        bench.clock.run_until(step * 0.05)
        if step % 4 == 0:
            read_s += observed.engine.read().busy_s
            bench.engine.read()
            assert observed.engine.worked_s == pytest.approx(read_s)
        assert observed.engine.worked_s == pytest.approx(min(step * 0.05, 0.65))
    assert [*observed.done_s.values()] == [*bench.done_s.values()] == [pytest.approx(0.65)]
