"""Chooses tensor parallel size, weight format and replicas of each tier: the cheapest that fits and meets the
SLO.

For every tier, GPU model, parallel size and allowed format, three questions are answered: does it fit
(:mod:`.gpu_memory`), which request rate can a replica serve within the SLO (:mod:`.roofline`), and how many
replicas does the load need? Then one option per tier is chosen so that the fleet suffices at the lowest cost.
The speeds are estimates from published GPU figures; the result says so, and gives the reason for each choice,
the next best option, and why the others were ruled out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from controlplane.core.domain.request import RequestShape
from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.feasibility import FitLimits, shortfalls
from controlplane.core.sizing.gpu_memory import plan_memory
from controlplane.core.sizing.gpu_models import GpuModel
from controlplane.core.sizing.quantization import preset
from controlplane.core.sizing.roofline import LatencyTargets, ReplicaSpeed, roofline

TARGET_RATIO = 0.7
"""Share of a replica's capacity that the expected load may use; the rest is for bursts."""

PARALLEL_SIZES = (1, 2, 4, 8)
MOST_REPLICAS = 1000
LENGTH_FACTOR = 2
"""Sequences this many times as long as the mean must fit as well."""
BASIS = "a roofline estimate from published GPU figures; correct it with measured speeds"
"""The source of the speeds, for reports."""


@dataclass(frozen=True, slots=True)
class TierNeed:
    """One tier: its model, the load that it must serve, and the options that are allowed."""

    name: str
    model: ModelSpec
    request: RequestShape
    requests_per_s: float
    slo: LatencyTargets
    quantizations: tuple[str, ...] = ("none",)
    """Allowed weight formats by name, the preferred one first."""
    settings: EngineArgs = field(default_factory=EngineArgs)
    pipeline: bool = False
    """Whether pipeline parallelism may be used."""


@dataclass(frozen=True, slots=True)
class FleetGpu:
    """GPUs of one model."""

    gpu: GpuModel
    count: int
    cost_per_hour: float
    """Cost of one GPU, in a currency that is the same for all."""
    per_node: int = 8
    """GPUs of one node; a tensor-parallel group never spans nodes."""


@dataclass(frozen=True, slots=True)
class ServingOption:
    """One way to serve a tier."""

    gpu: str
    tp: int
    pp: int
    quantization: str
    replicas: int
    cost_per_hour: float
    capacity: ReplicaSpeed
    """One replica at the highest rate within the SLO."""
    expected: ReplicaSpeed
    """One replica at its share of the expected load."""
    sequences: int
    """Sequences that fit a replica at once."""

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replicas * self.tp * self.pp

    def __str__(self) -> str:
        parallel = f"tensor parallel {self.tp}" + (f" x pipeline parallel {self.pp}" if self.pp > 1 else "")
        return (
            f"{self.replicas} x {self.gpu} ({parallel}, {self.quantization}): {self.gpus} GPUs, "
            f"{self.cost_per_hour:.2f} per hour, about {self.expected.ttft_ms:.0f} ms to the first token and "
            f"{self.expected.itl_ms:.1f} ms per token"
        )


@dataclass(frozen=True, slots=True)
class RuledOutOption:
    """One way to serve a tier that was ruled out, and why."""

    gpu: str
    tp: int
    pp: int
    quantization: str
    reason: str


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The option chosen for a tier."""

    tier: str
    option: ServingOption
    why: str
    next_best: ServingOption | None
    """The cheapest other option for this tier alone."""
    ruled_out: tuple[RuledOutOption, ...]


@dataclass(frozen=True, slots=True)
class FleetSizing:
    """Choices for all tiers that fit the fleet together."""

    choices: tuple[TierChoice, ...]
    cost_per_hour: float
    gpus_used: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class NoFleetSizing:
    """No choice of options serves every tier with this fleet."""

    reasons: tuple[str, ...]
    ruled_out: tuple[tuple[str, tuple[RuledOutOption, ...]], ...] = field(default=())
    """Per tier."""


def size_tiers(needs: Sequence[TierNeed], fleet: Sequence[FleetGpu]) -> FleetSizing | NoFleetSizing:
    """The cheapest way to serve every tier with the fleet."""
    found = {need.name: options(need, fleet) for need in needs}
    unserved = [need.name for need in needs if not found[need.name][0]]
    if unserved:
        reasons = tuple(f"tier '{name}': {_main_reason(found[name][1])}" for name in unserved)
        return NoFleetSizing(reasons, tuple((name, found[name][1]) for name in unserved))
    available = {entry.gpu.name: entry.count for entry in fleet}
    # Tiers with few options first: that shortens the search.
    order = sorted(needs, key=lambda need: len(found[need.name][0]))
    best = _cheapest([_fewest_gpus(found[need.name][0]) for need in order], available)
    if best is None:
        least = {need.name: min(o.gpus for o in found[need.name][0]) for need in needs}
        wanted = ", ".join(f"'{name}' at least {gpus}" for name, gpus in least.items())
        have = ", ".join(f"{count} x {name}" for name, count in available.items())
        return NoFleetSizing(
            (f"the tiers together need more GPUs than there are: {wanted}; there is {have}",)
        )
    chosen = {need.name: option for need, option in zip(order, best, strict=True)}
    choices = tuple(_choice(need, chosen[need.name], *found[need.name]) for need in needs)
    used: Counter[str] = Counter()
    for option in chosen.values():
        used[option.gpu] += option.gpus
    return FleetSizing(choices, sum(o.cost_per_hour for o in chosen.values()), tuple(sorted(used.items())))


def options(
    need: TierNeed, fleet: Sequence[FleetGpu]
) -> tuple[tuple[ServingOption, ...], tuple[RuledOutOption, ...]]:
    """Every option to serve one tier, cheapest first, and every option that was ruled out."""
    found: list[ServingOption] = []
    ruled_out: list[RuledOutOption] = []
    for entry in fleet:
        for name, tp, pp in _shapes(need, entry):
            result = _option(need, entry, name, tp, pp)
            if isinstance(result, ServingOption):
                found.append(result)
            else:
                ruled_out.append(RuledOutOption(entry.gpu.name, tp, pp, name, result))
    preference = {name: rank for rank, name in enumerate(need.quantizations)}
    found.sort(key=lambda o: (o.cost_per_hour, preference[o.quantization], o.tp * o.pp, o.gpu))
    return tuple(found), tuple(ruled_out)


def _shapes(need: TierNeed, entry: FleetGpu) -> Iterator[tuple[str, int, int]]:
    formats = ("none",) if need.model.quantization.quantized else need.quantizations
    for name in formats:
        for tp in PARALLEL_SIZES:
            for pp in (1, 2, 4) if need.pipeline else (1,):
                if tp <= entry.per_node and tp * pp <= entry.count:
                    yield name, tp, pp


def _option(need: TierNeed, entry: FleetGpu, name: str, tp: int, pp: int) -> ServingOption | str:
    """The option with its replicas, or the reason why it is ruled out."""
    gpu, model, request = entry.gpu, need.model, need.request
    quantization = preset(name)
    settings = replace(need.settings, tp=tp, pp=pp)
    if quantization.quantized:
        settings = replace(settings, quantization=quantization)
    tokens = round(request.input_tokens + request.output_tokens)
    length = min(tokens * LENGTH_FACTOR, model.max_length)
    plan = plan_memory(model, settings, gpu)
    reasons = shortfalls(plan, FitLimits(length=length))
    if reasons:
        return reasons[0]
    sequences = plan.sequences(tokens)
    try:
        line = roofline(model, settings, gpu)
    except ValueError as error:
        return str(error)
    capacity = line.capacity(request, need.slo, sequences)
    if capacity.requests_per_s <= 0:
        return _too_slow(capacity, need.slo)
    wanted = need.requests_per_s / (capacity.requests_per_s * TARGET_RATIO)
    replicas = max(math.ceil(wanted - 1e-9), 1)
    if replicas > MOST_REPLICAS or replicas * tp * pp > entry.count:
        return f"{replicas} replicas need {replicas * tp * pp} GPUs, there are {entry.count}"
    expected = line.speed(request, need.requests_per_s / replicas)
    cost = replicas * tp * pp * entry.cost_per_hour
    return ServingOption(gpu.name, tp, pp, name, replicas, cost, capacity, expected, sequences)


def _too_slow(idle: ReplicaSpeed, slo: LatencyTargets) -> str:
    """Why a replica misses the SLO even with a single request at a time; ``idle`` is its speed in that
    case."""
    parts = []
    if idle.ttft_ms > slo.ttft_ms:
        parts.append(f"{idle.ttft_ms:.0f} ms to the first token, at most {slo.ttft_ms:g} wanted")
    if idle.itl_ms > slo.itl_ms:
        parts.append(f"{idle.itl_ms:.1f} ms per token, at most {slo.itl_ms:g} wanted")
    return "even idle: " + "; ".join(parts) if parts else "it can't serve any load within the SLO"


def _fewest_gpus(found: Sequence[ServingOption]) -> list[ServingOption]:
    """For each GPU model, the option with the fewest GPUs, which costs least and leaves most GPUs to other
    tiers."""
    best: dict[str, ServingOption] = {}
    for option in found:
        known = best.get(option.gpu)
        if known is None or option.gpus < known.gpus:
            best[option.gpu] = option
    return sorted(best.values(), key=lambda option: option.cost_per_hour)


def _cheapest(
    ways: Sequence[Sequence[ServingOption]], available: dict[str, int]
) -> list[ServingOption] | None:
    """One option per tier within the available GPUs at the lowest cost; None if there is none.

    A depth-first search that leaves out branches that can't be cheaper than the best choice so far.
    """
    rest = [0.0] * (len(ways) + 1)
    for index in range(len(ways) - 1, -1, -1):
        rest[index] = rest[index + 1] + ways[index][0].cost_per_hour
    best: list[ServingOption] | None = None
    best_cost = math.inf

    def descend(index: int, cost: float, chosen: list[ServingOption], left: dict[str, int]) -> None:
        nonlocal best, best_cost
        if cost + rest[index] >= best_cost:
            return
        if index == len(ways):
            best, best_cost = list(chosen), cost
            return
        for option in ways[index]:
            if option.gpus <= left[option.gpu]:
                left[option.gpu] -= option.gpus
                descend(index + 1, cost + option.cost_per_hour, [*chosen, option], left)
                left[option.gpu] += option.gpus

    descend(0, 0.0, [], dict(available))
    return best


def _choice(
    need: TierNeed,
    option: ServingOption,
    found: Sequence[ServingOption],
    ruled_out: tuple[RuledOutOption, ...],
) -> TierChoice:
    others = [other for other in found if other != option]
    cheaper = [other for other in others if other.cost_per_hour < option.cost_per_hour - 1e-9]
    next_best = others[0] if others else None
    rate = option.capacity.requests_per_s
    why = (
        f"{need.requests_per_s:g} requests/s at {TARGET_RATIO:.0%} of {rate:.2f} per replica inside "
        f"{need.slo.ttft_ms:g} ms to the first token and {need.slo.itl_ms:g} ms per token need "
        f"{option.replicas} replica{'' if option.replicas == 1 else 's'}"
    )
    if cheaper:
        why += f"; {cheaper[0].gpu} would be cheaper here, but other tiers take those GPUs"
    elif next_best:
        why += f"; the next best costs {next_best.cost_per_hour:.2f} instead of {option.cost_per_hour:.2f}"
    else:
        why += "; no other option fits and meets the SLO"
    return TierChoice(need.name, option, why, next_best, ruled_out)


def _main_reason(ruled_out: Sequence[RuledOutOption]) -> str:
    if not ruled_out:
        return "there is no GPU for it"
    last = ruled_out[-1]
    largest = f"{last.gpu} x {last.tp * last.pp}"
    return f"none of {len(ruled_out)} options serves it; the last one tried, {largest}: {last.reason}"
