"""Turns tiers into gangs: the resources that a replica of each tier needs, on the GPU models of a cluster.

The memory model determines which GPU models a replica fits and the minimum memory that it needs on each. A
tier whose model can't be read is planned without memory, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.placement.gangs import WHOLE_MILLI, Gang, GangShape
from controlplane.core.placement.topology import Node
from controlplane.core.sizing.cpu_memory import judge_cpu
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.feasibility import FitLimits, Unfit, judge, shortfalls
from controlplane.core.sizing.gpu_memory import MemoryPlan, plan_memory
from controlplane.core.sizing.gpu_models import GpuModel, find_gpu
from controlplane.errors import SetupError
from controlplane.models.catalog import gpu_table
from controlplane.models.model_config import LoadedModel, load_model
from controlplane.planning.tier_memory import cpu_plan, llamacpp_bytes, tier_settings


@dataclass(frozen=True, slots=True)
class TierGang:
    """The resources that one tier needs."""

    tier: TierConfig
    shape: GangShape | None
    """Of one replica; None if it runs outside the cluster or fits no known GPU model."""
    gpu_bytes: int = 0
    """Minimum memory that a replica needs on each of its GPUs; 0 if unknown."""
    unfit: tuple[tuple[str, str], ...] = ()
    """(GPU model of the cluster that a replica doesn't fit, reason and remedy)."""
    notes: tuple[str, ...] = ()

    def gangs(self) -> tuple[Gang, ...]:
        """One per replica."""
        if self.shape is None:
            return ()
        return tuple(
            Gang(f"{self.tier.name}-{i}", self.shape, self.tier.name) for i in range(self.tier.replicas)
        )

    def scaled(self, replicas: int) -> TierGang:
        """The same tier with another number of replicas."""
        return replace(self, tier=self.tier.model_copy(update={"replicas": replicas}))


def tier_gangs(config: PlaneConfig, nodes: Sequence[Node]) -> tuple[TierGang, ...]:
    """The resources that each tier needs on ``nodes``, in the configuration's order."""
    models = {gpu.model: gpu.memory_bytes for node in nodes for gpu in node.gpus}
    largest_bytes = max((node.memory_bytes for node in nodes), default=0)
    return tuple(_tier_gang(tier, models, largest_bytes) for tier in config.tiers)


def _tier_gang(tier: TierConfig, models: dict[str, int], largest_bytes: int) -> TierGang:
    if tier.engine == "endpoint":
        return TierGang(tier, None, notes=(f"runs elsewhere: {tier.url}",))
    if tier.engine == "simulated":
        return TierGang(tier, _shape(tier))
    try:
        loaded = load_model(tier.model)
        settings = tier_settings(tier)
    except (SetupError, ValueError) as error:
        return TierGang(tier, _shape(tier), notes=(f"memory is not checked: {error}",))
    if not tier.on_gpus:
        return _on_cpus(tier, loaded, settings, largest_bytes)
    return _on_gpus(tier, loaded, settings, models)


def _on_cpus(tier: TierConfig, loaded: LoadedModel, settings: EngineArgs, largest_bytes: int) -> TierGang:
    if tier.engine == "llamacpp":
        weights, kv, _ = llamacpp_bytes(tier, loaded)
        if not weights:
            return TierGang(
                tier, _shape(tier), notes=("memory is not checked: the model file is not on this machine",)
            )
        return TierGang(tier, _shape(tier, weights + kv))
    try:
        plan = cpu_plan(tier, loaded, settings, node_bytes=largest_bytes)
    except ValueError as error:
        return TierGang(tier, None, unfit=(("any CPU", str(error)),))
    verdict = judge_cpu(plan, total_bytes=largest_bytes, available_bytes=largest_bytes)
    if verdict.fits:
        return TierGang(tier, _shape(tier, plan.least_bytes))
    unfit = (("the largest node's memory", f"{verdict.reason}. What would: {verdict.remedy}"),)
    if plan.least_bytes <= largest_bytes:
        # Memory is not the reason: these settings would fail on any machine.
        return TierGang(tier, None, unfit=unfit)
    return TierGang(tier, _shape(tier, plan.least_bytes), unfit=unfit)


def _on_gpus(tier: TierConfig, loaded: LoadedModel, settings: EngineArgs, models: dict[str, int]) -> TierGang:
    milli, notes = _share(tier, settings)
    if tier.pipeline_across_nodes:
        notes = (*notes, "where stages are on several nodes, vLLM's Ray executor chooses the GPUs itself")
    needs: dict[str, int] = {}
    unfit: list[tuple[str, str]] = []
    unknown: list[str] = []
    for name in sorted(models):
        gpu = find_gpu(gpu_table(), name)
        if tier.gpu_models and (gpu is None or gpu.name not in tier.gpu_models):
            continue
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
    if needs and unfit and not tier.gpu_models:
        names = ", ".join(sorted(needs))
        notes = (*notes, f"set gpu_models to [{names}] in the tier, so that Ray puts it on no others")
    if not needs and unfit and not tier.gpu_models:
        # The cluster has no GPU model that fits: accept those of the table that do, so that each node's
        # refusal says what it lacks.
        accepted = frozenset(
            gpu.name
            for gpu in gpu_table()
            if not shortfalls(plan_memory(loaded.spec, settings, gpu, loaded.extra), FitLimits())
        )
    if unfit and not accepted:
        return TierGang(tier, None, unfit=tuple(unfit), notes=notes)
    shape = replace(_shape(tier), milli_gpu=milli)
    if unfit:
        shape = replace(shape, models=accepted)
    least = min((need for need in needs.values() if need), default=0)
    if not shape.shared:
        shape = replace(shape, gpu_memory_bytes=least)
    return TierGang(tier, shape, least, tuple(unfit), notes)


def _share(tier: TierConfig, settings: EngineArgs) -> tuple[int, tuple[str, ...]]:
    """The share of a GPU that a replica takes, in thousandths, with notes for the user. It is the larger of
    the shares of compute and memory."""
    share = tier.shape.milli_gpu
    if tier.gpu_share == 1 or settings.kv_cache_bytes:
        return share, ()
    taken = ceil(round(settings.memory_ratio * WHOLE_MILLI, 6))
    if taken <= share:
        return share, ()
    return taken, (
        f"gpu_share is {tier.gpu_share:g}, but the engine takes {settings.memory_ratio:g} of the GPU's "
        f"memory: set gpu-memory-utilization to less than {tier.gpu_share:g}",
    )


def _shape(tier: TierConfig, host_bytes: int = 0) -> GangShape:
    """The shape of one replica; its CPUs and host memory are divided among the stages."""
    stages = tier.pipeline_parallel_size
    return replace(
        tier.shape, cpu_milli=ceil(tier.cpus * 1000 / stages), memory_bytes=ceil(host_bytes / stages)
    )


def _judge(loaded: LoadedModel, settings: EngineArgs, gpu: GpuModel) -> tuple[int, str]:
    """(minimum bytes per GPU, ""), or (0, the reason why it doesn't fit, with the remedy)."""
    verdict = judge(plan_memory(loaded.spec, settings, gpu, loaded.extra))
    if isinstance(verdict, Unfit):
        return 0, f"{'; '.join(verdict.reasons)}. What would: {verdict.remedy}"
    return _least_bytes(verdict.plan), ""


def _least_bytes(plan: MemoryPlan) -> int:
    """Weights, overhead and the KV cache of one sequence of maximum length, on the GPU with the least
    room."""
    worst = plan.worst
    return worst.fixed_bytes + worst.layout.block_bytes * (worst.layout.blocks_for(plan.length) + 1)
