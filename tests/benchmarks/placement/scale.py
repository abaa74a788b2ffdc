"""How long a plan takes, by the size of the fleet."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlplane.core.gangs import Gang, Shape
from controlplane.core.placement import ClusterState
from controlplane.core.planning import plan
from controlplane.core.revalidation import revalidate
from tests.benchmarks.placement.gangs import fleet

GANGS = 500
SIZES = (80, 640, 2_560, 5_120, 10_000, 20_000)
"""GPUs; eight to a node."""
_SHAPES = (
    (Shape(milli_gpu=500, gpu_memory_bytes=30 * 2**30, cpu_milli=4000), 25),
    (Shape(gpu_memory_bytes=60 * 2**30, cpu_milli=8000), 30),
    (Shape(gpus=2, gpu_memory_bytes=70 * 2**30, cpu_milli=16000), 20),
    (Shape(gpus=4, gpu_memory_bytes=70 * 2**30, cpu_milli=32000), 15),
    (Shape(gpus=8, gpu_memory_bytes=70 * 2**30, cpu_milli=64000), 7),
    (Shape(gpus=8, stages=2, gpu_memory_bytes=70 * 2**30, cpu_milli=64000, across_nodes=True), 3),
)


@dataclass(frozen=True)
class Point:
    """One fleet."""

    gpus: int
    gangs: int
    placed: int
    seconds: float


def gangs(number: int, seed: int = 0) -> tuple[Gang, ...]:
    """Replicas of twenty tiers, from half a GPU to two nodes each."""
    rng = random.Random(seed)
    shapes, weights = zip(*_SHAPES, strict=True)
    tiers = [(f"tier{i:02d}", rng.choices(shapes, weights)[0]) for i in range(20)]
    picks = [rng.choice(tiers) for _ in range(number)]
    return tuple(Gang(f"{tier}-{i}", shape, tier) for i, (tier, shape) in enumerate(picks))


def measure(sizes: Sequence[int] = SIZES, repeats: int = 3) -> Iterator[Point]:
    """The best of some repeats: from nodes as values to a plan as a value."""
    wanted = gangs(GANGS)
    for size in sizes:
        state = ClusterState(fleet(size // 8))
        best = float("inf")
        for _ in range(repeats):
            start_s = time.perf_counter()
            answer = plan(state, wanted)
            best = min(best, time.perf_counter() - start_s)
        if revalidate(answer.placements, state):
            raise AssertionError("the plan does not hold")
        yield Point(size, GANGS, len(answer.placements), best)


def table(points: Sequence[Point]) -> Iterator[dict[str, object]]:
    """One row per fleet."""
    for point in points:
        yield {
            "policy": "tierplane",
            "workload": "plan",
            "gpus": point.gpus,
            "gangs": point.gangs,
            "gangs_placed": point.placed,
            "seconds": round(point.seconds, 3),
        }


def chart(points: Sequence[Point], width: int = 50) -> str:
    """Bars for a terminal."""
    longest = max(point.seconds for point in points)
    return "\n".join(
        f"{point.gpus:>7,} GPUs {'█' * max(1, round(width * point.seconds / longest))} {point.seconds:.3f} s"
        for point in points
    )


def svg(points: Sequence[Point], path: Path) -> None:
    """A plot as a file, without a plotting library: seconds over GPUs."""
    left, top, wide, high = 60, 20, 560, 300
    most_s = max(point.seconds for point in points)
    most_gpus = max(point.gpus for point in points)
    places = [
        (left + wide * point.gpus / most_gpus, top + high * (1 - point.seconds / most_s)) for point in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="end">{point.seconds:.3f} s</text>'
        f'<text x="{x:.1f}" y="{top + high + 18}" text-anchor="middle">{point.gpus:,}</text>'
        for (x, y), point in zip(places, points, strict=True)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 40}" height="{top + high + 60}" '
        f'font-family="sans-serif" font-size="11"><path d="M{left},{top} V{top + high} H{left + wide}" '
        f'fill="none" stroke="#888"/><polyline points="{line}" fill="none" stroke="#06c"/>{dots}'
        f'<text x="{left + wide / 2}" y="{top + high + 45}" text-anchor="middle">GPUs of the fleet, '
        f"{points[0].gangs} gangs planned</text></svg>\n",
        encoding="utf-8",
    )
