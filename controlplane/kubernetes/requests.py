"""The resources that a tier's pod requests from Kubernetes, from the memory model.

On a CPU the memory model covers the whole engine. With GPUs it decides whether the engine fits them; the
pod's own memory is an estimate that builds on measured process sizes (not measured on a GPU machine):
processes, the weights that pass through host memory while they load, and shared memory between the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from controlplane.config import BUNDLED_PREFIX, TierConfig
from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.cpu_memory import (
    API_SERVER_BYTES,
    ENGINE_CORE_BYTES,
    WORKER_BYTES,
    plan_cpu_memory,
)
from controlplane.core.sizing.engine_args import EngineArgs, parse_settings
from controlplane.core.sizing.feasibility import Unfit, judge
from controlplane.core.sizing.gpu_memory import MemoryPlan, plan_memory
from controlplane.core.sizing.gpu_models import GIB, MIB
from controlplane.errors import ConfigError, Problem, SetupError
from controlplane.kubernetes.overlays import Overlay
from controlplane.models.catalog import gpu_named, known_model
from controlplane.models.model_config import load_model

RAY_BYTES: Final = 2 * GIB
"""Raylet, agents, object store and a replica actor beside the engine."""
CUDA_HOST_BYTES: Final = 2 * GIB
"""Host memory of one worker's CUDA context and pinned buffers."""
SHARED_BYTES: Final = GIB
"""Shared memory for each rank's collectives, in ``/dev/shm``."""
LIGHT_BYTES: Final = GIB
"""An engine without a model in this pod: ``endpoint`` or ``simulated``."""
_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_SUFFIXES = ("-AWQ", "-GPTQ-Int4", "-FP8")


@dataclass(frozen=True, slots=True)
class PodNeed:
    """The resources of one pod of a tier."""

    replicas: int
    """Replicas of the tier in this pod: more than one if they share a GPU."""
    gpus: int
    cpus: int
    memory_bytes: int
    shared_bytes: int
    source: str
    """What the memory request is based on, as text."""


def pod_need(tier: TierConfig, overlay: Overlay) -> PodNeed:
    """The pod of one tier. Raises ConfigError if the tier can't run on the overlay's nodes."""
    if tier.engine != "vllm":
        gpus, cpus = ceil(tier.gpus), max(1, ceil(tier.cpus))
        return PodNeed(1, gpus, cpus, RAY_BYTES + LIGHT_BYTES, 0, "no model in vLLM")
    settings = _settings(tier)
    model = _model(tier)
    if tier.device == "cpu":
        return _cpu(tier, model, settings)
    return _gpu(tier, model, settings, overlay)


def _cpu(tier: TierConfig, model: ModelSpec, settings: EngineArgs) -> PodNeed:
    space = tier.env.get(_KV_SPACE, "1")
    if not space.isdigit() or not int(space):
        raise _problem(
            tier, f"env.{_KV_SPACE}", f"'{space}' is not a valid size", "use a whole number of GiB"
        )
    # node_bytes has no effect, because the size of the cache is set.
    plan = plan_cpu_memory(model, settings, kv_cache_bytes=int(space) * GIB, node_bytes=0)
    cpus = max(ceil(tier.cpus), settings.world_size)
    return PodNeed(1, 0, cpus + 1, plan.total_bytes + RAY_BYTES, 0, "memory model, engine on CPU")


def _gpu(tier: TierConfig, model: ModelSpec, settings: EngineArgs, overlay: Overlay) -> PodNeed:
    if overlay.gpu is None:
        raise _problem(
            tier, "device", f"overlay {overlay.name} has no GPUs", "set device: cpu, or use another overlay"
        )
    if tier.gpu_models and overlay.gpu not in tier.gpu_models:
        message = f"overlay {overlay.name} has {overlay.gpu}, the tier allows {', '.join(tier.gpu_models)}"
        raise _problem(tier, "gpu_models", message, f"add {overlay.gpu}, or use another overlay")
    if tier.pipeline_across_nodes:
        message = "the network policies allow no traffic between the pods of one engine"
        raise _problem(tier, "pipeline_across_nodes", message, "remove it: an engine stays on one node")
    gpus = ceil(tier.engine_gpus)
    if gpus > overlay.gpus_per_node:
        raise _problem(
            tier,
            "tensor_parallel_size",
            f"one engine needs {gpus} GPUs, a node of overlay {overlay.name} has {overlay.gpus_per_node}",
            "lower tensor_parallel_size × pipeline_parallel_size: an engine stays on one node",
        )
    plan = plan_memory(model, settings, gpu_named(overlay.gpu))
    verdict = judge(plan)
    unsure = [*model.guesses, *(f"the effect of --{flag} is not known" for flag in settings.unmodelled)]
    source = f"memory model, weights on {overlay.gpu}"
    if isinstance(verdict, Unfit):
        reasons = "; ".join(verdict.reasons)
        if not unsure:
            raise _problem(tier, "model", f"does not fit {overlay.gpu}: {reasons}", verdict.remedy)
        source += f"; may not fit ({reasons}), but that is a guess: {'; '.join(unsure)}"
    engines = int(1 / tier.gpu_share) if settings.world_size == 1 else 1
    ranks = settings.world_size
    processes = API_SERVER_BYTES + ENGINE_CORE_BYTES + ranks * (WORKER_BYTES + CUDA_HOST_BYTES)
    shared = ranks * SHARED_BYTES
    memory = RAY_BYTES + engines * (processes + shared + _weights_bytes(plan))
    cpus = engines * (2 + ranks) + 1
    return PodNeed(engines, gpus, cpus, memory, engines * shared, source)


def _weights_bytes(plan: MemoryPlan) -> int:
    """The size of the whole engine's weights, which pass through the page cache."""
    return plan.settings.tp * sum(stage.weights_bytes for stage in plan.stages)


def _settings(tier: TierConfig) -> EngineArgs:
    args: dict[str, Any] = dict(tier.engine_args)
    if tier.device == "cpu":
        args = {"dtype": "float32", "enforce-eager": True} | args
    try:
        return parse_settings(
            args, tp=tier.tensor_parallel_size, pp=tier.pipeline_parallel_size, device=tier.device
        )
    except ValueError as error:
        raise _problem(tier, "engine_args", str(error), "see controlplane/core/sizing/memory.md") from error


def _model(tier: TierConfig) -> ModelSpec:
    """From the table of known models (also for a quantised variant), or else from the model's files."""
    name = tier.model
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    known = None if name.startswith(BUNDLED_PREFIX) else known_model(name)
    if known is not None:
        return known
    try:
        return load_model(tier.model).spec
    except (SetupError, ValueError, OSError) as error:
        message = f"the size of the model is unknown: {error}"
        raise _problem(tier, "model", message, "`tierplane fit --models` lists known models") from error


def _problem(tier: TierConfig, key: str, message: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(f"tiers.{tier.name}.{key}", message, remedy)])


def mebibytes(size_bytes: int) -> str:
    """A Kubernetes quantity, rounded up to 256 MiB."""
    return f"{ceil(size_bytes / (256 * MIB)) * 256}Mi"
