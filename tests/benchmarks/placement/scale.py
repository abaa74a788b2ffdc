"""Planning time by the size of the fleet."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang, GangShape
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.revalidation import revalidate
from tests.benchmarks.placement.gangs import fleet

GANGS = 500
SIZES = (80, 640, 2_560, 5_120, 10_000, 20_000)
"""GPUs, eight per node."""
_SHAPES = (
    (GangShape(milli_gpu=500, gpu_memory_bytes=30 * 2**30, cpu_milli=4000), 25),
    (GangShape(gpu_memory_bytes=60 * 2**30, cpu_milli=8000), 30),
    (GangShape(gpus=2, gpu_memory_bytes=70 * 2**30, cpu_milli=16000), 20),
    (GangShape(gpus=4, gpu_memory_bytes=70 * 2**30, cpu_milli=32000), 15),
    (GangShape(gpus=8, gpu_memory_bytes=70 * 2**30, cpu_milli=64000), 7),
    (GangShape(gpus=8, stages=2, gpu_memory_bytes=70 * 2**30, cpu_milli=64000, across_nodes=True), 3),
)


@dataclass(frozen=True)
class Point:
    """The result for one size of fleet."""

    gpus: int
    gangs: int
    placed: int
    seconds: float


def gangs(number: int) -> tuple[Gang, ...]:
    """Replicas of twenty tiers, from half a GPU to two nodes each."""
    rng = random.Random(0)
    shapes, weights = zip(*_SHAPES, strict=True)
    tiers = [(f"tier{i:02d}", rng.choices(shapes, weights)[0]) for i in range(20)]
    picks = [rng.choice(tiers) for _ in range(number)]
    return tuple(Gang(f"{tier}-{i}", shape, tier) for i, (tier, shape) in enumerate(picks))


def measure(sizes: Sequence[int] = SIZES, repeats: int = 3) -> Iterator[Point]:
    """Plan for each size of fleet; the time is the best of ``repeats``."""
    wanted = gangs(GANGS)
    for size in sizes:
        state = PlacedCluster(fleet(size // 8))
        best = float("inf")
        for _ in range(repeats):
            start_s = time.perf_counter()
            result = plan(state, wanted)
            best = min(best, time.perf_counter() - start_s)
        if revalidate(result.placements, state):
            raise AssertionError("the plan is not valid")
        yield Point(size, GANGS, len(result.placements), best)


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


def chart(points: Sequence[Point]) -> str:
    """A bar chart for a terminal."""
    longest = max(point.seconds for point in points)
    return "\n".join(
        f"{point.gpus:>7,} GPUs {'█' * max(1, round(50 * point.seconds / longest))} {point.seconds:.3f} s"
        for point in points
    )


def svg(points: Sequence[Point], path: Path) -> None:
    """Write a plot without a plotting library: seconds over GPUs on a logarithmic scale."""
    left, top, width, height = 70, 30, 560, 300
    most_s = max(1.0, *(point.seconds for point in points))
    low, up = (log10(pick(point.gpus for point in points)) for pick in (min, max))
    dots_at = [
        (
            left + 30 + (width - 60) * (log10(point.gpus) - low) / ((up - low) or 1),
            top + height * (1 - point.seconds / most_s),
        )
        for point in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots_at)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#06c"/>'
        f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{point.seconds:.3f} s</text>'
        f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{point.gpus:,}</text>'
        for (x, y), point in zip(dots_at, points, strict=True)
    )
    grid = "".join(
        f'<path d="M{left},{y:.1f} h{width}" stroke="#ddd"/>'
        f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{seconds:g} s</text>'
        for seconds in (0.25, 0.5, 0.75, 1.0)
        for y in [top + height * (1 - seconds / most_s)]
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{top + height + 60}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>{grid}'
        f'<path d="M{left},{top} v{height} h{width}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#06c"/>{dots}'
        f'<text x="{left + width / 2}" y="{top + height + 45}" text-anchor="middle">GPUs of the fleet; '
        f"time to plan {points[0].gangs} gangs</text></svg>\n",
        encoding="utf-8",
    )
