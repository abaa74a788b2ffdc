"""A model of an engine with continuous batching: two or three events per request.

All decoding sequences advance by one token per step, so a response of n tokens that joins when the engine has
made V steps is done at step V + n. A heap of these final steps suffices; single tokens are not simulated. The
duration of a step for the batch and its context comes from :class:`EngineTiming`. A prompt occupies the whole
engine for its prefill time, which is close to chunked prefill, and each of its chunks carries one token for
every decoding sequence. A sequence needs KV cache for its tokens; when the cache is full, the youngest
sequence returns to the engine's queue and is computed again later, as in vLLM. Prefixes are cached by block,
and the least recently used blocks are evicted first.

Engine ``simulated`` works differently: prompts are processed in parallel, each slows the steps of the others
like one more decoding sequence, and the KV cache is only a gauge.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, Final, Protocol

from controlplane.core.sizing.roofline import Roofline
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.trace_rows import BLOCK_TOKENS

CHUNK_TOKENS: Final = 2048
"""Prompt tokens of one step (vLLM's ``max_num_batched_tokens`` for serving is 2048 or more)."""


class EngineTiming(Protocol):
    """The durations of an engine's work."""

    @property
    def parallel_prompts(self) -> bool:
        """Prompts are processed in parallel and count as part of the batch of a step."""

    @property
    def kv_bound(self) -> bool:
        """The KV cache limits the running sequences and caches prefixes; otherwise only its usage is
        measured."""

    def prompt_s(self, tokens: int) -> float:
        """Time to process a prompt."""

    def step_s(self, batch: float, context: float) -> float:
        """Time of one decode step of ``batch`` sequences with ``context`` tokens each."""


@dataclass(frozen=True, slots=True)
class RooflineTiming:
    """A GPU engine that reaches ``ratio`` of the roofline's speed."""

    line: Roofline
    ratio: float = 1.0
    parallel_prompts: ClassVar[bool] = False
    kv_bound: ClassVar[bool] = True

    def prompt_s(self, tokens: int) -> float:
        """Time to process a prompt."""
        return self.line.prefill_s(tokens) / self.ratio

    def step_s(self, batch: float, context: float) -> float:
        """Time of one decode step."""
        return self.line.step_s(batch, context) / self.ratio


@dataclass(frozen=True, slots=True)
class SimulatedTiming:
    """The timing model of engine ``simulated``."""

    ttft_s: float
    itl_s: float
    batch_slowdown: float = 0.0
    prefill_tokens_per_s: float = 0.0
    parallel_prompts: bool = True
    kv_bound: bool = False

    def prompt_s(self, tokens: int) -> float:
        """Time to process a prompt."""
        return self.ttft_s + (tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0)

    def step_s(self, batch: float, context: float) -> float:
        """Time of one decode step, independent of ``context``."""
        return self.itl_s * (1 + self.batch_slowdown * (batch - 1)) or 1e-6


class EngineJob:
    """One request inside an engine."""

    __slots__ = (
        *("blocks", "computed_tokens", "first_s", "generated_tokens", "input_tokens", "joined_step"),
        *("output_tokens", "payload"),
    )

    def __init__(
        self, input_tokens: int, output_tokens: int, blocks: tuple[int, ...] | None, payload: Any
    ) -> None:
        self.input_tokens = input_tokens
        self.output_tokens = max(output_tokens, 1)
        self.blocks = blocks
        self.payload = payload
        self.first_s: float | None = None
        """Time of its first token."""
        self.generated_tokens = 0
        self.computed_tokens = 0
        """Prompt tokens that were computed, not found in the prefix cache."""
        self.joined_step = 0.0
        """The engine's step count when it joined the decoding sequences."""


@dataclass(slots=True)
class EngineMeter:
    """The work of an engine since the last reading."""

    busy_s: float = 0.0
    batch_s: float = 0.0
    """Number of running sequences, integrated over time."""
    generated_tokens: float = 0.0
    prompt_tokens: float = 0.0
    """Computed prompt tokens."""


class VirtualEngine:
    """One engine process under the virtual clock."""

    def __init__(
        self,
        clock: VirtualClock,
        timing: EngineTiming,
        *,
        max_sequences: int,
        kv_tokens: float,
        on_first: Callable[[EngineJob], None],
        on_done: Callable[[EngineJob], None],
    ) -> None:
        self._clock = clock
        self._timing = timing
        self._max_sequences = max_sequences
        self._kv_capacity = kv_tokens
        self._kv_limit = kv_tokens if timing.kv_bound else math.inf
        self._on_first = on_first
        self._on_done = on_done
        self.waiting: deque[EngineJob] = deque()
        self._decoding: list[tuple[float, int, EngineJob]] = []
        """A heap of (step count at which the job is done, number in the order of joining, job)."""
        self._prefilling: dict[int, EngineJob] = {}
        """Jobs whose prompts are being processed, by their number in the order of starting."""
        self._prefills = 0
        self._steps = 0.0
        self._step_s = 0.0
        self._last_s = 0.0
        self._version = 0
        """Changes when the scheduled end of decoding is no longer valid."""
        self._kv_used = 0.0
        self._joined = 0
        self._in_event = False
        self._dead = False
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self.meter = EngineMeter()
        self._read_busy_s = 0.0
        """Busy time in the meters returned by :meth:`read`."""

    @property
    def running(self) -> int:
        """Sequences that decode or whose prompts are being processed."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def kv_usage_ratio(self) -> float:
        """The used share of the KV cache."""
        return min(1.0, self._kv_used / self._kv_capacity)

    @property
    def worked_s(self) -> float:
        """Busy time since the start of the engine. Reading this has no side effects."""
        since_s = self._clock.now_s - self._last_s if self.running else 0.0
        return self._read_busy_s + self.meter.busy_s + since_s

    def submit(self, job: EngineJob) -> None:
        """Add a job to the engine's queue."""
        self.waiting.append(job)
        if not self._in_event:
            self._advance()
            self._plan()

    def kill(self) -> list[EngineJob]:
        """End the process; returns all its jobs."""
        self._advance()
        self._dead = True
        self._version += 1
        lost = [*self._prefilling.values(), *(entry[2] for entry in self._decoding), *self.waiting]
        self.waiting.clear()
        self._decoding.clear()
        self._prefilling.clear()
        return lost

    def read(self) -> EngineMeter:
        """The work since the last call."""
        self._advance()
        meter, self.meter = self.meter, EngineMeter()
        self._read_busy_s += meter.busy_s
        return meter

    def _advance(self) -> None:
        """Update steps, KV cache and meter to the present."""
        now_s = self._clock.now_s
        passed_s = now_s - self._last_s
        self._last_s = now_s
        if passed_s <= 0:
            return
        batch = len(self._decoding)
        meter = self.meter
        if batch or self._prefilling:
            meter.busy_s += passed_s
            meter.batch_s += passed_s * (batch + len(self._prefilling))
        if batch and (not self._prefilling or self._timing.parallel_prompts):
            steps = passed_s / self._step_s
            self._step(steps, batch)

    def _step(self, steps: float, batch: int) -> None:
        self._steps += steps
        self._kv_used += steps * batch
        self.meter.generated_tokens += steps * batch

    def _plan(self) -> None:
        """Start prompts that fit, and schedule the next end of a decoding sequence."""
        parallel = self._timing.parallel_prompts
        while self.waiting and (parallel or not self._prefilling) and self._fits(self.waiting[0]):
            self._begin_prompt(self.waiting.popleft())
        decoding = self._decoding
        if not decoding or (self._prefilling and not parallel):
            return
        batch = len(decoding)
        prefills = len(self._prefilling)  # 0 unless prompts are processed in parallel
        self._step_s = self._timing.step_s(batch + prefills, self._kv_used / batch)
        steps = decoding[0][0] - self._steps
        free = self._kv_limit - self._kv_used
        if batch > 1 and free < steps * batch:
            steps = max(free, 0.0) / batch
        self._version += 1
        self._clock.at(self._clock.now_s + max(steps, 0.0) * self._step_s, self._decoded, self._version)

    def _fits(self, job: EngineJob) -> bool:
        if self.running >= self._max_sequences:
            return False
        # An idle engine accepts any job; otherwise one that is too large would wait for ever.
        need = job.input_tokens + job.generated_tokens
        return not self.running or self._kv_used + need <= self._kv_limit

    def _begin_prompt(self, job: EngineJob) -> None:
        self._prefills += 1
        self._prefilling[self._prefills] = job
        self._version += 1
        tokens = job.input_tokens + job.generated_tokens
        computed = max(tokens - self._cached_tokens(job), 1)
        job.computed_tokens += computed
        self._kv_used += tokens
        self.meter.prompt_tokens += computed
        takes_s = self._timing.prompt_s(computed)
        self._clock.at(self._clock.now_s + takes_s, self._prompt_done, (self._prefills, computed))

    def _cached_tokens(self, job: EngineJob) -> int:
        """Prompt tokens that are in the prefix cache; adds the whole prompt to it."""
        if not job.blocks or not self._timing.kv_bound:
            return 0
        cache = self._prefixes
        cached_blocks = 0
        for block in job.blocks:
            if block not in cache:
                break
            cached_blocks += 1
        for block in job.blocks:
            cache[block] = None
            cache.move_to_end(block)
        capacity = int(self._kv_capacity // BLOCK_TOKENS)
        while len(cache) > capacity:
            cache.popitem(last=False)
        # At least one token must be computed.
        return min(cached_blocks * BLOCK_TOKENS, job.input_tokens - 1)

    def _prompt_done(self, argument: tuple[int, int]) -> None:
        if self._dead:
            return
        number, computed = argument
        self._in_event = True
        self._advance()
        job = self._prefilling.pop(number)
        batch = len(self._decoding)
        if batch and not self._timing.parallel_prompts:
            self._step(-(-computed // CHUNK_TOKENS), batch)
        self._joined += 1
        job.generated_tokens += 1
        job.joined_step = self._steps
        self._kv_used += 1
        self.meter.generated_tokens += 1
        if job.first_s is None:
            job.first_s = self._clock.now_s
            self._on_first(job)
        if job.generated_tokens >= job.output_tokens:
            self._finish(job)
        else:
            done_step = self._steps + job.output_tokens - job.generated_tokens
            heappush(self._decoding, (done_step, self._joined, job))
        self._complete()
        self._in_event = False
        self._plan()

    def _decoded(self, version: int) -> None:
        if version != self._version or self._dead:
            return
        self._in_event = True
        self._advance()
        self._complete()
        if len(self._decoding) > 1 and self._kv_limit - self._kv_used < 0.5:
            self._preempt()
        self._in_event = False
        self._plan()

    def _complete(self) -> None:
        decoding = self._decoding
        while decoding and decoding[0][0] <= self._steps + 1e-6:
            job = heappop(decoding)[2]
            job.generated_tokens = job.output_tokens
            self._finish(job)

    def _finish(self, job: EngineJob) -> None:
        kv_used = self._kv_used - job.input_tokens - job.generated_tokens
        self._kv_used = max(0.0, kv_used) if self.running else 0.0
        self._on_done(job)

    def _preempt(self) -> None:
        """Put the youngest decoding sequence back into the queue, and free its part of the KV cache."""
        index = max(range(len(self._decoding)), key=lambda i: self._decoding[i][1])
        job = self._decoding[index][2]
        self._decoding[index] = self._decoding[-1]
        self._decoding.pop()
        heapify(self._decoding)
        since_joined = self._steps - job.joined_step
        kv_used = self._kv_used - job.input_tokens - job.generated_tokens - since_joined
        self._kv_used = max(0.0, kv_used)
        generated = int(job.generated_tokens + self._steps - job.joined_step)
        job.generated_tokens = min(generated, job.output_tokens - 1)
        self.waiting.appendleft(job)
