from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from controlplane.engines.simulated.batching import BatchScheduler, Finish, GenerationRequest, metrics_text
from controlplane.engines.simulated.engine import SimulatedSettings
from controlplane.engines.simulated.text import ANSWER, encode
from tests.support.waiting import until_async

PROMPT = (*encode("user: hello\n"), ANSWER)


class Receiver:
    """A sink that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.was_cut = False
        self.over = asyncio.Event()

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        self.times += [time.monotonic()] * len(ids)
        self.ids += ids
        self.finish = finish
        if finish is not None:
            self.over.set()

    def truncate(self) -> None:
        self.was_cut = True
        self.over.set()


def scheduler(**settings: Any) -> BatchScheduler:
    return BatchScheduler(asyncio.get_running_loop(), SimulatedSettings(**settings))


async def test_with_zero_times_a_response_is_complete_at_once() -> None:
    work, sink = scheduler(), Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=5), sink)
    assert sink.finish is not None
    assert sink.finish.reason == "length"
    assert (work.running, work.waiting) == (0, 0)


async def test_a_long_response_with_zero_times_lets_others_run() -> None:
    work, long, short = scheduler(), Receiver(), Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=3000, ignore_eos=True), long)
    work.submit(GenerationRequest(PROMPT, max_tokens=3), short)
    assert short.finish is not None
    assert long.finish is None
    await asyncio.wait_for(long.over.wait(), 5)
    assert len(long.ids) == 3000


async def test_time_to_first_token_and_between_tokens() -> None:
    work, sink = scheduler(ttft_ms=60, itl_ms=10, prefill_tokens_per_s=100), Receiver()
    began_s = time.monotonic()
    work.submit(GenerationRequest(PROMPT, max_tokens=11), sink)
    await asyncio.wait_for(sink.over.wait(), 5)
    prefill_s = len(PROMPT) / 100
    assert sink.times[0] - began_s == pytest.approx(0.06 + prefill_s, abs=0.05)
    # The schedule holds on average: a late timer does not delay all that follow.
    assert sink.times[-1] - sink.times[0] >= 0.095
    assert work.counts.itl_s.sum == pytest.approx(sink.times[-1] - sink.times[0], abs=0.02)


async def test_a_larger_batch_is_slower() -> None:
    alone, sink = scheduler(itl_ms=4, batch_slowdown=1.0), Receiver()
    alone.submit(GenerationRequest(PROMPT, max_tokens=20), sink)
    await asyncio.wait_for(sink.over.wait(), 5)
    alone_s = sink.times[-1] - sink.times[0]
    batch, sinks = scheduler(itl_ms=4, batch_slowdown=1.0), [Receiver() for _ in range(4)]
    for receiver in sinks:
        batch.submit(GenerationRequest(PROMPT, max_tokens=20), receiver)
    await asyncio.wait_for(asyncio.gather(*(receiver.over.wait() for receiver in sinks)), 10)
    batch_s = sinks[0].times[-1] - sinks[0].times[0]
    # 1 + 1 × (4 − 1) = 4 times, a little less while the last ones end.
    assert batch_s > 2.5 * alone_s


async def test_more_than_it_runs_wait_in_order_and_are_counted() -> None:
    work = scheduler(max_running=2, itl_ms=5)
    sinks = [Receiver() for _ in range(4)]
    for sink in sinks:
        work.submit(GenerationRequest(PROMPT, max_tokens=5), sink)
    assert (work.running, work.waiting) == (2, 2)
    await asyncio.wait_for(asyncio.gather(*(sink.over.wait() for sink in sinks)), 5)
    assert sinks[2].times[0] >= min(sinks[0].times[-1], sinks[1].times[-1])
    assert (work.running, work.waiting) == (0, 0)
    assert work.counts.finished["length"] == 4


async def test_a_client_that_disconnects_frees_its_slot_for_the_next() -> None:
    work = scheduler(max_running=1, itl_ms=1000)
    first, second, third = Receiver(), Receiver(), Receiver()
    running = work.submit(GenerationRequest(PROMPT), first)
    waiting = work.submit(GenerationRequest(PROMPT), second)
    work.submit(GenerationRequest(PROMPT), third)
    work.abort(waiting)
    work.abort(running)
    await until_async(lambda: third.ids)
    assert (work.running, work.waiting) == (1, 0)
    assert not second.ids
    assert work.counts.finished["abort"] == 2
    work.abort(running)
    assert work.counts.finished["abort"] == 2


async def test_a_slow_reader_stops_the_tokens() -> None:
    work, sink = scheduler(itl_ms=1), Receiver()
    generation = work.submit(GenerationRequest(PROMPT, max_tokens=50), sink)
    work.pause(generation)
    other = Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=50), other)
    await asyncio.wait_for(other.over.wait(), 5)
    assert len(sink.ids) < 10
    work.resume(generation)
    await asyncio.wait_for(sink.over.wait(), 5)
    assert len(sink.ids) == 50


@pytest.mark.parametrize("itl_ms", [0, 1])
async def test_cut_and_hang_after_tokens(itl_ms: int) -> None:
    work, sink = scheduler(itl_ms=itl_ms, cut_after_tokens=7), Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=50), sink)
    await asyncio.wait_for(sink.over.wait(), 5)
    assert (sink.was_cut, len(sink.ids), work.running) == (True, 7, 0)
    work, sink = scheduler(itl_ms=itl_ms, hang_after_tokens=7), Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=50), sink)
    await until_async(lambda: len(sink.ids) == 7)
    later = Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=50), later)
    await until_async(lambda: len(later.ids) == 7)
    assert (len(sink.ids), sink.finish, work.running) == (7, None, 2)
    work.change(SimulatedSettings(itl_ms=itl_ms))
    await asyncio.wait_for(sink.over.wait(), 5)
    assert len(sink.ids) == 50


async def test_the_share_of_errors_is_as_configured_and_repeats_with_the_seed() -> None:
    def run() -> list[bool]:
        work = scheduler(error_rate=0.3, seed=7)
        return [work.fails_next() for _ in range(2000)]

    first = run()
    assert sum(first) / 2000 == pytest.approx(0.3, abs=0.05)
    assert first == run()


async def test_metrics_are_prometheus_text() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    work, sink = scheduler(), Receiver()
    work.submit(GenerationRequest(PROMPT, max_tokens=5), sink)
    families = {
        family.name: family for family in text_string_to_metric_families(metrics_text(work, "m").decode())
    }
    assert families["simulated:generation_tokens"].samples[0].value == 5
    assert families["simulated:prompt_tokens"].samples[0].value == len(PROMPT)
    samples = families["simulated:inter_token_latency_seconds"].samples
    assert [s.value for s in samples if s.labels.get("le") == "+Inf"] == [4]
    assert families["simulated:num_requests_running"].samples[0].labels == {"model_name": "m"}
