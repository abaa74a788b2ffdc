"""From tiers to gangs: what one replica of each needs, on the GPU models that a cluster has.

The memory model says which GPU models hold a replica, and how much of each GPU it needs at least. A tier
whose model can't be read is planned without that, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from controlplane.adapters.catalog import gpu_table
from controlplane.adapters.model_config import LoadedModel, load_model
from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.engine_settings import EngineSettings, parse_settings
from controlplane.core.feasibility import Limits, Unfit, judge, shortfalls
from controlplane.core.gangs import WHOLE_MILLI, Gang, Shape
from controlplane.core.gpus import GpuModel, find_gpu
from controlplane.core.memory import MemoryPlan, plan_memory
from controlplane.core.topology import Node
from controlplane.errors import SetupError


@dataclass(frozen=True, slots=True)
class TierDemand:
    """What one tier asks of a cluster."""

    tier: TierConfig
    shape: Shape | None
    """Of one replica; None: it runs elsewhere, or on no GPU model that is known."""
    gpu_bytes: int = 0
    """What a replica needs of each GPU at least; 0: not known."""
    unfit: tuple[tuple[str, str], ...] = ()
    """GPU models of the cluster that can't hold it, each with the reason and the remedy."""
    notes: tuple[str, ...] = ()

    def gangs(self) -> tuple[Gang, ...]:
        """One per replica."""
        if self.shape is None:
            return ()
        return tuple(
            Gang(f"{self.tier.name}-{i}", self.shape, self.tier.name) for i in range(self.tier.replicas)
        )

    def scaled(self, replicas: int) -> TierDemand:
        """The same with another number of replicas."""
        return replace(self, tier=self.tier.model_copy(update={"replicas": replicas}))


def tier_demands(config: PlaneConfig, nodes: Sequence[Node]) -> tuple[TierDemand, ...]:
    """What each tier asks for, in the configuration's order."""
    models = {gpu.model: gpu.memory_bytes for node in nodes for gpu in node.gpus}
    return tuple(_demand(tier, models) for tier in config.tiers)


def _demand(tier: TierConfig, models: dict[str, int]) -> TierDemand:
    if tier.engine == "endpoint":
        return TierDemand(tier, None, notes=(f"runs elsewhere: {tier.url}",))
    cpu_milli = ceil(tier.cpus * 1000 / tier.pipeline_parallel_size)
    if not tier.gpus:
        return TierDemand(tier, Shape(gpus=0, cpu_milli=cpu_milli))
    try:
        loaded = load_model(tier.model)
        settings = _settings(tier)
    except (SetupError, ValueError) as error:
        milli, notes = _share(tier, None)
        note = f"memory is not checked: {error}"
        return TierDemand(tier, _shape(tier, milli, cpu_milli), notes=(*notes, note))
    milli, notes = _share(tier, settings)
    needs: dict[str, int] = {}
    unfit: list[tuple[str, str]] = []
    unknown: list[str] = []
    for name in sorted(models):
        gpu = find_gpu(gpu_table(), name)
        if gpu is None:
            unknown.append(name or "without a name")
            needs[name] = 0
            continue
        need, problem = _judge(loaded, settings, gpu)
        if problem:
            unfit.append((name, problem))
        else:
            needs[name] = need
    if unknown:
        notes = (*notes, f"memory is not checked on GPUs that are not in the table: {', '.join(unknown)}")
    accepted = frozenset(needs)
    if not needs and unfit:
        # What would do, though the cluster has none: so each node can say what it lacks.
        accepted = frozenset(
            gpu.name
            for gpu in gpu_table()
            if not shortfalls(plan_memory(loaded.spec, settings, gpu, loaded.extra), Limits())
        )
        if not accepted:
            return TierDemand(tier, None, unfit=tuple(unfit), notes=notes)
    shape = _shape(tier, milli, cpu_milli, accepted if unfit else frozenset())
    known = [need for need in needs.values() if need]
    least = min(known, default=0)
    if not shape.shared:
        shape = replace(shape, gpu_memory_bytes=least)
    return TierDemand(tier, shape, least, tuple(unfit), notes)


def _settings(tier: TierConfig) -> EngineSettings:
    args: dict[str, Any] = dict(tier.engine_args)
    return parse_settings(args, tp=tier.tensor_parallel_size, pp=tier.pipeline_parallel_size)


def _share(tier: TierConfig, settings: EngineSettings | None) -> tuple[int, tuple[str, ...]]:
    """The part of a GPU that a replica takes: its share, or its memory if that is more."""
    share = tier.shape.milli_gpu
    if settings is None or tier.gpu_share == 1 or settings.kv_cache_bytes:
        return share, ()
    taken = ceil(round(settings.memory_ratio * WHOLE_MILLI, 6))
    if taken <= share:
        return share, ()
    return taken, (
        f"gpu_share is {tier.gpu_share:g}, but the engine takes {settings.memory_ratio:g} of the GPU's "
        f"memory: set gpu-memory-utilization to less than {tier.gpu_share:g}",
    )


def _shape(tier: TierConfig, milli: int, cpu_milli: int, models: frozenset[str] = frozenset()) -> Shape:
    return replace(tier.shape, milli_gpu=milli, cpu_milli=cpu_milli, models=models)


def _judge(loaded: LoadedModel, settings: EngineSettings, gpu: GpuModel) -> tuple[int, str]:
    """(least bytes per GPU, "") or (0, why it does not fit and what would)."""
    verdict = judge(plan_memory(loaded.spec, settings, gpu, loaded.extra))
    if isinstance(verdict, Unfit):
        return 0, f"{'; '.join(verdict.reasons)}. What would: {verdict.remedy}"
    return _least_bytes(verdict.plan), ""


def _least_bytes(plan: MemoryPlan) -> int:
    """Weights, overhead and the KV cache of one longest sequence, on the fullest GPU."""
    worst = plan.worst
    return worst.fixed_bytes + worst.layout.block_bytes * (worst.layout.blocks_for(plan.length) + 1)
