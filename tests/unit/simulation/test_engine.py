from __future__ import annotations

import pytest

from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.engine import (
    BLOCK_TOKENS,
    EngineJob,
    EngineTiming,
    SimulatedTiming,
    VirtualEngine,
)


class Steady:
    """10 ms a step and 1 ms for each sequence, 0.1 ms a prompt token."""

    parallel_prompts = False
    kv_bound = True

    def prompt_s(self, tokens: int) -> float:
        return tokens * 1e-4

    def step_s(self, batch: int, context: float) -> float:
        return 0.010 + 0.001 * batch


class Bench:
    def __init__(
        self, *, timing: EngineTiming | None = None, kv_tokens: float = 1e9, max_sequences: int = 100
    ) -> None:
        self.clock = VirtualClock()
        self.done: list[EngineJob] = []
        self.engine = VirtualEngine(
            self.clock,
            timing or Steady(),
            max_sequences=max_sequences,
            kv_tokens=kv_tokens,
            on_first=lambda job: None,
            on_done=self.done.append,
        )

    def submit(self, prompt: int, answer: int, blocks: tuple[int, ...] | None = None) -> EngineJob:
        job = EngineJob(prompt, answer, blocks, None)
        self.engine.submit(job)
        return job


def test_one_alone_takes_its_prompt_and_its_steps() -> None:
    bench = Bench()
    job = bench.submit(1000, 51)
    bench.clock.run_until(100.0)
    assert job.first_s == pytest.approx(0.1)
    assert job.done_s == pytest.approx(0.1 + 50 * 0.011)


def test_two_share_each_step() -> None:
    bench = Bench()
    first, second = bench.submit(1000, 101), bench.submit(1000, 101)
    bench.clock.run_until(100.0)
    assert second.first_s == pytest.approx(0.2)
    # One token of the first comes with the second's prompt; then both step together.
    assert first.done_s == pytest.approx(0.2 + 99 * 0.012)
    assert second.done_s == pytest.approx(first.done_s + 0.011)


def test_prompts_of_a_parallel_engine_do_not_wait_for_each_other() -> None:
    bench = Bench(timing=SimulatedTiming(0.1, 0.01))
    jobs = [bench.submit(10, 11) for _ in range(5)]
    bench.clock.run_until(10.0)
    assert [job.first_s for job in jobs] == [pytest.approx(0.1)] * 5
    assert [job.done_s for job in jobs] == [pytest.approx(0.2)] * 5


def test_its_own_queue_holds_what_is_over_its_sequences() -> None:
    bench = Bench(max_sequences=2)
    for _ in range(3):
        bench.submit(100, 50)
    assert bench.engine.running == 1
    assert len(bench.engine.waiting) == 2
    bench.clock.run_until(0.05)
    assert (bench.engine.running, len(bench.engine.waiting)) == (2, 1)
    bench.clock.run_until(50.0)
    assert len(bench.done) == 3


def test_a_full_cache_puts_the_youngest_back_and_all_end() -> None:
    bench = Bench(kv_tokens=1500)
    jobs = [bench.submit(400, 400) for _ in range(3)]
    bench.clock.run_until(500.0)
    assert sorted(map(id, bench.done)) == sorted(map(id, jobs))
    assert bench.engine.meter.preempted > 0
    assert bench.done[0] is jobs[0]
    assert all(job.made == 400 for job in jobs)
    assert bench.engine.kv_usage_ratio == 0.0


def test_one_larger_than_the_cache_is_served_alone() -> None:
    bench = Bench(kv_tokens=100)
    bench.submit(500, 20)
    bench.submit(10, 20)
    bench.clock.run_until(100.0)
    assert len(bench.done) == 2


def test_a_prefix_that_is_there_is_not_computed_again() -> None:
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


def test_a_dead_engine_gives_back_everything_once_and_says_no_more() -> None:
    bench = Bench(max_sequences=3)
    jobs = [bench.submit(1000, 500) for _ in range(5)]
    bench.clock.run_until(0.25)
    lost = bench.engine.kill()
    assert sorted(map(id, lost)) == sorted(map(id, jobs))
    bench.clock.run_until(1000.0)
    assert bench.done == []


def test_the_meter_counts_what_was_done() -> None:
    bench = Bench()
    for _ in range(4):
        bench.submit(200, 30)
    bench.clock.run_until(60.0)
    meter = bench.engine.read()
    assert meter.generated == pytest.approx(120, abs=1)
    assert meter.prompted == 800
    assert 0 < meter.busy_s < 60
    assert bench.engine.read().generated == 0


def test_how_long_it_has_worked_is_all_that_meters_said_and_looking_changes_nothing() -> None:
    looked, bench = Bench(), Bench()
    for each in (looked, bench):
        each.submit(1000, 51)
    assert looked.engine.worked_s == 0.0
    read_s = 0.0
    for step in range(1, 40):
        looked.clock.run_until(step * 0.05)
        bench.clock.run_until(step * 0.05)
        if step % 4 == 0:
            read_s += looked.engine.read().busy_s
            bench.engine.read()
            assert looked.engine.worked_s == pytest.approx(read_s)
        assert looked.engine.worked_s == pytest.approx(min(step * 0.05, 0.65))
    assert looked.done[0].done_s == bench.done[0].done_s == pytest.approx(0.65)
