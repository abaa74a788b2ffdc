"""A fake engine: continuous batching as an event model, two or three events a request.

All sequences that decode advance by one token a step, so an answer of n tokens that joins when the engine has
made V steps is done after V + n: a heap of those marks is all that is kept, and no single token is simulated.
A step takes what :class:`EngineTiming` says for the batch and its context. A prompt takes the engine for
itself for its time, as chunked prefill nearly does, and each of its chunks carries one token for those that
decode. A sequence needs room in the KV cache for what it has; when the cache is full the youngest is put back
into the engine's queue and later computed again, as vLLM does. Prefixes are kept by block, least recently
used. Engine ``simulated`` does neither: its prompts are worked on side by side, each slows the others' steps
as one more that decodes, and its KV cache is a gauge.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Final, Protocol

from controlplane.core.sizing.roofline import Roofline
from controlplane.simulation.clock import VirtualClock

CHUNK_TOKENS: Final = 2048
"""Prompt tokens of one step (vLLM's ``max_num_batched_tokens`` for serving is 2048 or more)."""
BLOCK_TOKENS: Final = 512
"""Prompt tokens that one hash of a trace stands for (Mooncake)."""


class EngineTiming(Protocol):
    """How long an engine takes."""

    @property
    def parallel_prompts(self) -> bool:
        """Prompts don't take the engine from each other; they count into the batch of a step."""

    @property
    def kv_bound(self) -> bool:
        """The KV cache limits what runs, and keeps prefixes; otherwise it is only measured."""

    def prompt_s(self, tokens: int) -> float:
        """To process a prompt."""

    def step_s(self, batch: int, context: float) -> float:
        """One decode step of ``batch`` sequences with ``context`` tokens each."""


@dataclass(frozen=True, slots=True)
class RooflineTiming:
    """A GPU engine that reaches ``ratio`` of the roofline's speed."""

    line: Roofline
    ratio: float = 1.0
    parallel_prompts: bool = False
    kv_bound: bool = True

    def prompt_s(self, tokens: int) -> float:
        """To process a prompt."""
        return self.line.prefill_s(tokens) / self.ratio

    def step_s(self, batch: int, context: float) -> float:
        """One decode step."""
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
        """To process a prompt."""
        return self.ttft_s + (tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0)

    def step_s(self, batch: int, context: float) -> float:
        """One decode step; ``context`` makes no difference."""
        return self.itl_s * (1 + self.batch_slowdown * (batch - 1)) or 1e-6


class EngineJob:
    """One request inside an engine."""

    __slots__ = (
        *("blocks", "computed_tokens", "done_s", "engine", "first_s", "input_tokens", "kv_tokens"),
        *("made", "mark", "output_tokens", "payload", "sequence"),
    )

    def __init__(
        self, input_tokens: int, output_tokens: int, blocks: tuple[int, ...] | None, payload: Any
    ) -> None:
        self.input_tokens = input_tokens
        self.output_tokens = max(output_tokens, 1)
        self.blocks = blocks
        self.payload = payload
        self.first_s: float | None = None
        self.done_s = 0.0
        self.made = 0
        """Answer tokens that it has."""
        self.computed_tokens = 0
        """Prompt tokens that were computed for it, not taken from the prefix cache."""
        self.kv_tokens = 0.0
        self.mark = 0.0
        """The engine's step count when it joined."""
        self.sequence = 0
        self.engine: VirtualEngine | None = None


@dataclass(slots=True)
class EngineMeter:
    """What an engine did since it was read."""

    busy_s: float = 0.0
    batch_s: float = 0.0
    """Sequences that decode, over time."""
    generated: float = 0.0
    prompted: float = 0.0
    preempted: int = 0


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
        self._running: list[tuple[float, int, EngineJob]] = []
        """(step count at which it is done, order of joining, job)."""
        self._prompting: dict[int, EngineJob] = {}
        """Whose prompts are being processed, by the order of their beginning."""
        self._begun = 0
        self._steps = 0.0
        self._step_s = 0.0
        self._last_s = 0.0
        self._version = 0
        self._kv_used = 0.0
        self._sequence = 0
        self._inside = False
        self._dead = False
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self.meter = EngineMeter()
        self._read_busy_s = 0.0
        """Of the meters that were read."""

    @property
    def running(self) -> int:
        """Sequences that it works on."""
        return len(self._running) + len(self._prompting)

    @property
    def kv_usage_ratio(self) -> float:
        """The used share of the KV cache."""
        return min(1.0, self._kv_used / self._kv_capacity)

    @property
    def worked_s(self) -> float:
        """How long it has worked since it began; looking changes nothing."""
        since_s = self._clock.now_s - self._last_s if self.running else 0.0
        return self._read_busy_s + self.meter.busy_s + since_s

    def submit(self, job: EngineJob) -> None:
        """A request arrives."""
        job.engine = self
        self.waiting.append(job)
        if not self._inside:
            self._advance()
            self._plan()

    def kill(self) -> list[EngineJob]:
        """The process dies; what it had is returned."""
        self._advance()
        self._dead = True
        self._version += 1
        lost = [*self._prompting.values(), *(entry[2] for entry in self._running), *self.waiting]
        self.waiting.clear()
        self._running.clear()
        self._prompting.clear()
        return lost

    def read(self) -> EngineMeter:
        """What it did since the last call."""
        self._advance()
        meter, self.meter = self.meter, EngineMeter()
        self._read_busy_s += meter.busy_s
        return meter

    def _advance(self) -> None:
        """Brings the count of steps up to now."""
        now_s = self._clock.now_s
        passed_s = now_s - self._last_s
        self._last_s = now_s
        if passed_s <= 0:
            return
        batch = len(self._running)
        meter = self.meter
        if batch or self._prompting:
            meter.busy_s += passed_s
            meter.batch_s += passed_s * (batch + len(self._prompting))
        if batch and (not self._prompting or self._timing.parallel_prompts):
            steps = passed_s / self._step_s
            self._step(steps, batch)

    def _step(self, steps: float, batch: int) -> None:
        self._steps += steps
        self._kv_used += steps * batch
        self.meter.generated += steps * batch

    def _plan(self) -> None:
        """Decides what comes next."""
        parallel = self._timing.parallel_prompts
        while self.waiting and (parallel or not self._prompting) and self._fits(self.waiting[0]):
            self._begin_prompt(self.waiting.popleft())
        running = self._running
        if not running or (self._prompting and not parallel):
            return
        batch = len(running)
        beside = len(self._prompting)  # none but where prompts are parallel
        self._step_s = self._timing.step_s(batch + beside, self._kv_used / batch)
        steps = running[0][0] - self._steps
        room = self._kv_limit - self._kv_used
        if batch > 1 and room < steps * batch:
            steps = max(room, 0.0) / batch
        self._version += 1
        self._clock.at(self._clock.now_s + max(steps, 0.0) * self._step_s, self._decoded, self._version)

    def _fits(self, job: EngineJob) -> bool:
        if self.running >= self._max_sequences:
            return False
        # An empty engine takes whatever comes: nothing would ever change otherwise.
        need = job.input_tokens + job.made
        return not self.running or self._kv_used + need <= self._kv_limit

    def _begin_prompt(self, job: EngineJob) -> None:
        self._begun += 1
        self._prompting[self._begun] = job
        self._version += 1
        tokens = job.input_tokens + job.made
        fresh = max(tokens - self._hits(job), 1)
        job.computed_tokens += fresh
        job.kv_tokens = float(tokens)
        self._kv_used += tokens
        self.meter.prompted += fresh
        took_s = self._timing.prompt_s(fresh)
        self._clock.at(self._clock.now_s + took_s, self._prompt_done, (self._begun, fresh))

    def _hits(self, job: EngineJob) -> int:
        """Prompt tokens in the prefix cache; they are there afterwards in any case."""
        if not job.blocks or not self._timing.kv_bound:
            return 0
        cache = self._prefixes
        hits = 0
        for block in job.blocks:
            if block not in cache:
                break
            hits += 1
        for block in job.blocks:
            cache[block] = None
            cache.move_to_end(block)
        most = int(self._kv_capacity // BLOCK_TOKENS)
        while len(cache) > most:
            cache.popitem(last=False)
        # The last block is never whole: at least one token must be computed.
        return min(hits * BLOCK_TOKENS, job.input_tokens - 1)

    def _prompt_done(self, argument: tuple[int, int]) -> None:
        if self._dead:
            return
        number, fresh = argument
        self._inside = True
        self._advance()
        job = self._prompting.pop(number)
        batch = len(self._running)
        if batch and not self._timing.parallel_prompts:
            self._step(-(-fresh // CHUNK_TOKENS), batch)
        self._sequence += 1
        job.sequence = self._sequence
        job.made += 1
        job.mark = self._steps
        self._kv_used += 1
        self.meter.generated += 1
        if job.first_s is None:
            job.first_s = self._clock.now_s
            self._on_first(job)
        if job.made >= job.output_tokens:
            self._finish(job)
        else:
            heappush(self._running, (self._steps + job.output_tokens - job.made, job.sequence, job))
        self._complete()
        self._inside = False
        self._plan()

    def _decoded(self, version: int) -> None:
        if version != self._version or self._dead:
            return
        self._inside = True
        self._advance()
        self._complete()
        if len(self._running) > 1 and self._kv_limit - self._kv_used < 0.5:
            self._preempt()
        self._inside = False
        self._plan()

    def _complete(self) -> None:
        running = self._running
        while running and running[0][0] <= self._steps + 1e-6:
            job = heappop(running)[2]
            job.made = job.output_tokens
            self._finish(job)

    def _finish(self, job: EngineJob) -> None:
        self._kv_used = max(0.0, self._kv_used - job.input_tokens - job.made) if self.running else 0.0
        job.done_s = self._clock.now_s
        self._on_done(job)

    def _preempt(self) -> None:
        """The youngest gives its place in the cache up and waits."""
        index = max(range(len(self._running)), key=lambda i: self._running[i][1])
        job = self._running[index][2]
        self._running[index] = self._running[-1]
        self._running.pop()
        heapify(self._running)
        made = min(int(job.made + self._steps - job.mark), job.output_tokens - 1)
        self._kv_used = max(0.0, self._kv_used - job.input_tokens - job.made - (self._steps - job.mark))
        job.made = made
        self.meter.preempted += 1
        self.waiting.appendleft(job)
