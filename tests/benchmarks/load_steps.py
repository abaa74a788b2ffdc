"""A load that changes in steps on a live plane, and what the plane made of it, second by second."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from time import monotonic

from tests.benchmarks.load import Kind, Load, Question, generate, question, session
from tests.support.plane import Plane

LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Step:
    """A constant rate of requests for some seconds."""

    per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Look:
    """The tier at one moment; seconds since the load began."""

    at_s: float
    ready: int
    living: int


@dataclass
class Run:
    """What happened."""

    load: Load = field(default_factory=Load)
    looks: list[Look] = field(default_factory=list)
    began_s: float = 0.0

    def ready_at(self, at_s: float) -> int:
        """Replicas that served then."""
        before = [look for look in self.looks if look.at_s <= at_s]
        return (before or self.looks)[-1 if before else 0].ready

    def most(self) -> int:
        """The most replicas that ever served."""
        return max(look.ready for look in self.looks)

    def replica_s(self, until_s: float) -> float:
        """Replica-seconds, from order to end, up to ``until_s``."""
        looks = [look for look in self.looks if look.at_s <= until_s]
        pairs = pairwise(looks)
        return sum(a.living * (b.at_s - a.at_s) for a, b in pairs)


async def run_steps(
    plane: Plane,
    tier: str,
    steps: Sequence[Step],
    *,
    tokens: int,
    seed: int,
    done: Callable[[Run], bool] | None = None,
    done_within_s: float = 60.0,
) -> Run:
    """Play the steps, half of the requests streamed, with Poisson arrivals; then look on until ``done`` says
    so."""
    run = Run()
    over = asyncio.Event()

    def ask(number: int) -> tuple[Question, dict[str, str]]:
        kind: Kind = "stream" if random.Random(number).random() < 0.5 else "post"
        return question(number, kind, tier, tokens, tokens), {}

    async def look() -> None:
        while not over.is_set():
            states = await asyncio.to_thread(lambda: [item["state"] for item in plane.endpoints(tier)])
            run.looks.append(Look(monotonic() - run.began_s, states.count("ready"), len(states)))
            await asyncio.sleep(LOOK_S)

    run.began_s = monotonic()
    watcher = asyncio.create_task(look())
    try:
        async with session() as http:
            ends_s = run.began_s
            for number, step in enumerate(steps):
                ends_s += step.seconds
                # Requests of a step that still run do not hold the next one up.
                end_s = partial(float, ends_s)
                task = generate(run.load, http, plane.url, step.per_s, ask, end_s, poisson_seed=seed + number)
                running = asyncio.create_task(task)
                await asyncio.sleep(max(0.0, ends_s - monotonic()))
                last = running
            await last
        deadline_s = monotonic() + done_within_s
        while done is not None and not (run.looks and done(run)) and monotonic() < deadline_s:
            await asyncio.sleep(LOOK_S)
    finally:
        over.set()
        await watcher
    return run
