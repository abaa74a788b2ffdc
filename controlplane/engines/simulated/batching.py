"""The simulated engine's scheduler: which requests generate, which wait, and when each token is due.

Everything runs in one event loop, without locks. A :class:`Generation` is the response to one request while
it is generated. Its tokens go to a :class:`Sink`, which belongs to the HTTP server; this module knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import json
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple, Protocol

from controlplane.engines.simulated.engine import SimulatedSettings
from controlplane.engines.simulated.text import (
    ANSWER,
    END,
    WORD_TEXT,
    decode,
    digest,
    generated_length,
    next_tokens,
)

_TEXT_BYTES = {token: text.encode() for token, text in WORD_TEXT.items()}
_BURST_TOKENS = 256
"""Tokens emitted together when the time between tokens is 0."""
_MAX_LAG_S = 0.002
"""Timers have millisecond resolution. A delay up to this is compensated at the next token; a longer one
shifts the schedule."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a generation finished: ``stop`` (its natural end or a stop string) or ``length``."""

    reason: str
    stop_string: str | None = None


class Sink(Protocol):
    """Receives a generation's tokens."""

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """Take tokens, their texts as the inside of JSON strings, and with the last ones ``finish``."""
        ...

    def truncate(self) -> None:
        """Close the connection without completing the response."""
        ...


class GenerationRequest(NamedTuple):
    """What to generate. A named tuple, because each request creates one and tuples are cheap to create."""

    prompt_ids: Sequence[int]
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    script: tuple[bytes, ...] = ()
    """The texts of the tokens, as the inside of JSON strings, if they are known; ``stop`` does not apply."""


class Generation:
    """One response while it is generated."""

    __slots__ = (
        "_natural_tokens_left",
        "_previous",
        "_request",
        "_state",
        "_tokens_left",
        "_withheld",
        "arrived_s",
        "due_s",
        "emitted",
        "last_s",
        "paused",
        "prompt_tokens",
        "sink",
        "stalled",
        "started_s",
        "timer",
    )

    def __init__(
        self, request: GenerationRequest, settings: SimulatedSettings, sink: Sink, now_s: float
    ) -> None:
        ids = request.prompt_ids
        self.sink = sink
        self.prompt_tokens = len(ids)
        self.arrived_s = now_s
        self.started_s = now_s
        self.last_s = now_s
        self.due_s = now_s
        self.emitted = 0
        self.stalled = False
        self.paused = False
        self.timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._request = request
        self._state = digest(ids)
        self._previous = ids[-1] if ids else END
        room = max(settings.max_model_len - len(ids), 1)
        self._tokens_left = room if request.max_tokens is None else min(request.max_tokens, room)
        natural = len(request.script) or max(settings.tokens - generated_length(ids), request.min_tokens, 0)
        self._natural_tokens_left = room + 1 if request.ignore_eos and not request.script else natural
        self._withheld = ""

    def take(self, count: int) -> tuple[list[int], list[bytes], Finish | None]:
        """The next tokens, at most ``count``, their texts, and why the generation ends if it does."""
        if self._request.script:
            return self._take_scripted(count)
        words = min(count, self._tokens_left, self._natural_tokens_left)
        ids, self._state = next_tokens(self._state, self._previous, words)
        self._tokens_left -= words
        self._natural_tokens_left -= words
        finish: Finish | None = None
        if words < count and self._natural_tokens_left == 0 and self._tokens_left > 0:
            ids.append(END)
            self._tokens_left -= 1
            finish = Finish("stop")
        elif self._tokens_left == 0:
            finish = Finish("length")
        if ids:
            self._previous = ids[-1]
        self.emitted += len(ids)
        if self._request.stop:
            return self._take_until_stop(ids, finish)
        return ids, [_TEXT_BYTES[token] for token in ids], finish

    def _take_scripted(self, count: int) -> tuple[list[int], list[bytes], Finish | None]:
        script = self._request.script
        texts = list(script[self.emitted : self.emitted + min(count, self._tokens_left)])
        self._tokens_left -= len(texts)
        self.emitted += len(texts)
        finish: Finish | None = None
        if self.emitted == len(script):
            finish = Finish("stop")
        elif self._tokens_left == 0:
            finish = Finish("length")
        return [ANSWER] * len(texts), texts, finish

    def _take_until_stop(
        self, ids: list[int], finish: Finish | None
    ) -> tuple[list[int], list[bytes], Finish | None]:
        """Withholds text that may be the beginning of a stop string, as vLLM does."""
        texts: list[bytes] = []
        withheld_chars = max(len(stop) for stop in self._request.stop) - 1
        for index, token in enumerate(ids):
            self._withheld += decode([token])
            hits = [(at, stop) for stop in self._request.stop if (at := self._withheld.find(stop)) >= 0]
            if hits:
                at, stop = min(hits)
                texts.append(_json_inside(self._withheld[:at]))
                self.emitted -= len(ids) - index - 1
                return ids[: index + 1], texts, Finish("stop", stop)
            is_last = finish is not None and index == len(ids) - 1
            cut = len(self._withheld) if is_last else max(len(self._withheld) - withheld_chars, 0)
            texts.append(_json_inside(self._withheld[:cut]))
            self._withheld = self._withheld[cut:]
        return ids, texts, finish


class LatencyHistogram:
    """A Prometheus histogram to which many equal values can be added in one call."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add ``count`` observations of ``value``."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


def _times() -> LatencyHistogram:
    return LatencyHistogram(
        (
            0.001,
            0.005,
            0.01,
            0.02,
            0.04,
            0.06,
            0.08,
            0.1,
            0.25,
            0.5,
            0.75,
            1.0,
            2.5,
            5.0,
            10.0,
            20.0,
            40.0,
            80.0,
        )
    )


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine started."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    ttft_s: LatencyHistogram = field(default_factory=_times)
    itl_s: LatencyHistogram = field(default_factory=_times)
    e2e_s: LatencyHistogram = field(default_factory=_times)
    queue_s: LatencyHistogram = field(default_factory=_times)


class BatchScheduler:
    """The running batch and the queue in front of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: SimulatedSettings) -> None:
        self._loop = loop
        self.settings = settings
        self._random = random.Random(settings.seed)
        self._running: set[Generation] = set()
        self._waiting: deque[Generation] = deque()
        self.counts = EngineCounters()

    @property
    def running(self) -> int:
        """Requests that are generating."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def kv_usage_ratio(self) -> float:
        """The share of the KV cache that running requests occupy."""
        tokens = sum(g.prompt_tokens + g.emitted for g in self._running)
        return min(tokens / self.settings.kv_cache_tokens, 1.0)

    def fails_next(self) -> bool:
        """Decides by ``error_rate`` whether the next request fails; counts a failure."""
        rate = self.settings.error_rate
        if rate > 0 and self._random.random() < rate:
            self.counts.finished["error"] += 1
            return True
        return False

    def submit(self, request: GenerationRequest, sink: Sink) -> Generation:
        """Start or queue a generation. Its tokens may reach the sink before this returns."""
        generation = Generation(request, self.settings, sink, monotonic())
        if len(self._running) < self.settings.max_running:
            self._start(generation)
        else:
            self._waiting.append(generation)
        return generation

    def abort(self, generation: Generation) -> None:
        """Remove a generation whose client has disconnected. Does nothing if it has ended."""
        if generation in self._running:
            self._release(generation, "abort")
        elif generation in self._waiting:
            self._waiting.remove(generation)
            self.counts.finished["abort"] += 1

    def pause(self, generation: Generation) -> None:
        """Stop generating until :meth:`resume`, because the client reads too slowly."""
        generation.paused = True

    def resume(self, generation: Generation) -> None:
        """Continue after :meth:`pause`."""
        generation.paused = False
        if generation in self._running and generation.timer is None and not generation.stalled:
            self._step(generation)

    def change(self, settings: SimulatedSettings) -> None:
        """Applies settings, also to running generations. Stalled ones continue unless the new settings stall
        them."""
        self.settings = settings
        for generation in list(self._running):
            if generation.stalled:
                generation.stalled = False
                self._step(generation)
        self._start_waiting()

    def _start(self, generation: Generation) -> None:
        now_s = monotonic()
        settings = self.settings
        self._running.add(generation)
        generation.started_s = now_s
        self.counts.queue_s.observe(now_s - generation.arrived_s)
        self.counts.prompt_tokens += generation.prompt_tokens
        delay_s = settings.ttft_ms / 1000
        if settings.prefill_tokens_per_s:
            delay_s += generation.prompt_tokens / settings.prefill_tokens_per_s
        delay_s *= self._jitter_factor()
        generation.due_s = now_s + delay_s
        if delay_s:
            generation.timer = self._loop.call_later(delay_s, self._step, generation)
        else:
            self._step(generation)

    def _step(self, generation: Generation) -> None:
        generation.timer = None
        settings = self.settings
        if generation.paused:
            return
        count = 1 if settings.itl_ms else _BURST_TOKENS
        hang_after = 0 if settings.hang else settings.hang_after_tokens
        if hang_after is not None:
            count = min(count, hang_after - generation.emitted)
            if count <= 0:
                generation.stalled = True
                return
        cut_after = settings.cut_after_tokens
        if cut_after is not None:
            count = min(count, cut_after - generation.emitted)
            if count <= 0:
                self._truncate(generation)
                return
        ids, texts, finish = generation.take(count)
        now_s = monotonic()
        self._record(generation, len(ids), now_s)
        if finish is not None:
            self._release(generation, finish.reason)
            generation.sink.emit(ids, texts, finish)
            return
        generation.sink.emit(ids, texts, None)
        if cut_after is not None and generation.emitted >= cut_after:
            self._truncate(generation)
        elif generation in self._running:
            self._schedule(generation, now_s)

    def _schedule(self, generation: Generation, now_s: float) -> None:
        settings = self.settings
        if not settings.itl_ms:
            generation.timer = self._loop.call_soon(self._step, generation)
            return
        slower = 1 + settings.batch_slowdown * (len(self._running) - 1)
        due_s = (
            max(generation.due_s, now_s - _MAX_LAG_S)
            + settings.itl_ms / 1000 * slower * self._jitter_factor()
        )
        generation.due_s = due_s
        generation.timer = self._loop.call_later(max(due_s - now_s, 0.0), self._step, generation)

    def _record(self, generation: Generation, tokens: int, now_s: float) -> None:
        counts = self.counts
        counts.generation_tokens += tokens
        if generation.emitted == tokens:
            counts.ttft_s.observe(now_s - generation.arrived_s)
            tokens -= 1
            generation.last_s = now_s
        if tokens > 0:
            counts.itl_s.observe((now_s - generation.last_s) / tokens, tokens)
        generation.last_s = now_s

    def _truncate(self, generation: Generation) -> None:
        self._release(generation, "error")
        generation.sink.truncate()

    def _release(self, generation: Generation, reason: str) -> None:
        self._running.discard(generation)
        if generation.timer is not None:
            generation.timer.cancel()
            generation.timer = None
        self.counts.finished[reason] += 1
        if reason in ("stop", "length"):
            self.counts.e2e_s.observe(monotonic() - generation.arrived_s)
        if self._waiting:
            self._loop.call_soon(self._start_waiting)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self.settings.max_running:
            self._start(self._waiting.popleft())

    def _jitter_factor(self) -> float:
        jitter = self.settings.jitter
        return self._random.uniform(1 - jitter, 1 + jitter) if jitter else 1.0


def metrics_text(scheduler: BatchScheduler, model: str) -> bytes:
    """The scheduler's state and counters in Prometheus' text format."""
    counts = scheduler.counts
    label = f'model_name="{model}"'
    lines: list[str] = []

    def plain(name: str, kind: str, value: float) -> None:
        lines.append(f"# TYPE simulated:{name} {kind}")
        lines.append(f"simulated:{name}{{{label}}} {value}")

    plain("num_requests_running", "gauge", scheduler.running)
    plain("num_requests_waiting", "gauge", scheduler.waiting)
    plain("kv_cache_usage_perc", "gauge", scheduler.kv_usage_ratio)
    plain("prompt_tokens_total", "counter", counts.prompt_tokens)
    plain("generation_tokens_total", "counter", counts.generation_tokens)
    lines.append("# TYPE simulated:request_success_total counter")
    lines += [
        f'simulated:request_success_total{{{label},finished_reason="{reason}"}} {count}'
        for reason, count in counts.finished.items()
    ]
    for name, histogram in (
        ("time_to_first_token_seconds", counts.ttft_s),
        ("inter_token_latency_seconds", counts.itl_s),
        ("e2e_request_latency_seconds", counts.e2e_s),
        ("request_queue_time_seconds", counts.queue_s),
    ):
        lines.append(f"# TYPE simulated:{name} histogram")
        total = 0
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
            total += count
            lines.append(f'simulated:{name}_bucket{{{label},le="{bound}"}} {total}')
        lines.append(f"simulated:{name}_sum{{{label}}} {histogram.sum}")
        lines.append(f"simulated:{name}_count{{{label}}} {total}")
    return ("\n".join(lines) + "\n").encode()


def _json_inside(text: str) -> bytes:
    """``text`` as the inside of a JSON string."""
    return json.dumps(text)[1:-1].encode()
