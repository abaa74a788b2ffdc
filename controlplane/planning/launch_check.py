"""Refuses a launch that can't fit before the engine starts; the error has the figures and the smallest
change.

On GPUs only exact terms (weights, the KV cache of one full-length sequence, divisibility) refuse a launch; if
it fits only without the estimated terms, that is logged, and the engine's own profiling decides. If memory is
unknown (a model that isn't on this machine yet, a GPU that the driver doesn't show) nothing is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from controlplane.config import TierConfig
from controlplane.core.sizing.cpu_memory import judge_cpu
from controlplane.core.sizing.engine_args import MAY_REDUCE_MEMORY, EngineArgs
from controlplane.core.sizing.feasibility import FitLimits, Unfit, judge
from controlplane.core.sizing.gpu_memory import gib, plan_memory
from controlplane.core.sizing.gpu_models import GpuModel, find_gpu, unlisted_gpu
from controlplane.core.sizing.weights import divisibility
from controlplane.core.telemetry.samples import GpuSample, Missing
from controlplane.errors import EngineError, EngineStartError, SetupError
from controlplane.models import bundled
from controlplane.models.catalog import gpu_table
from controlplane.models.model_config import LoadedModel, load_model
from controlplane.node_agent.nvml.reader import GpuReader
from controlplane.planning.cpu_info import node_memory, packs_16_bit
from controlplane.planning.tier_memory import cpu_plan, llamacpp_bytes, tier_settings

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchCheck:
    """A launch that was not refused."""

    checked: bool
    """False if memory could not be checked; ``text`` then says why."""
    text: str
    """The finding, for the log."""


def launchable_model(
    tier: TierConfig, gpu_ids: Sequence[str], model: str, progress: Callable[[str], None]
) -> str:
    """The hub id or path that an engine of ``tier`` loads for ``model``, after a check that it fits.

    Blocks, and may download the model. Raises what :func:`controlplane.models.bundled.resolve` and
    :func:`check_launch` raise.
    """
    bundled.check_loadable(model, tier.engine)
    resolved = bundled.resolve(model, tier.engine, progress)
    progress("checking that it fits")
    try:
        check = check_launch(tier, resolved, gpu_ids)
    except EngineError:
        raise
    except Exception as error:
        # The engine may still run a model that the memory model can't handle.
        log.warning("launch not checked", error=f"{type(error).__name__}: {error}", exc_info=True)
    else:
        log.info("launch checked", memory_checked=check.checked, found=check.text)
    return resolved


def check_launch(
    tier: TierConfig, model: str, gpu_ids: Sequence[str] = (), *, reader: GpuReader | None = None
) -> LaunchCheck:
    """Check that an engine of ``tier`` with the resolved ``model`` can fit on this machine.

    ``gpu_ids`` are indices or UUIDs as for ``CUDA_VISIBLE_DEVICES``; none means all GPUs. Blocks for file
    reads and a few driver calls. Raises EngineStartError if it can never fit, EngineError if it doesn't fit
    beside the programs that run now.
    """
    if tier.engine not in {"vllm", "llamacpp"}:
        return LaunchCheck(False, f"engine '{tier.engine}' holds no weights here")
    try:
        loaded = load_model(model)
        settings = tier_settings(tier)
    except (SetupError, ValueError, OSError) as error:
        return LaunchCheck(False, f"memory was not checked: {error}")
    if tier.engine == "llamacpp":
        return _check_llamacpp(tier, loaded)
    if loaded.spec.guesses:
        return LaunchCheck(False, f"memory was not checked: {'; '.join(loaded.spec.guesses)}")
    flags = ", ".join(f"--{flag}" for flag in settings.unmodelled if flag in MAY_REDUCE_MEMORY)
    if flags:
        return LaunchCheck(False, f"memory was not checked: how much {flags} saves is not modelled")
    if tier.device == "cpu":
        return _check_cpu(tier, loaded, settings)
    if tier.pipeline_across_nodes:
        _check_divisibility(loaded, settings)
        return LaunchCheck(False, "memory was not checked: vLLM chooses the GPUs, maybe on several nodes")
    return _check_gpus(loaded, settings, _chosen(gpu_samples(reader), gpu_ids))


def _check_cpu(tier: TierConfig, loaded: LoadedModel, settings: EngineArgs) -> LaunchCheck:
    memory = node_memory()
    try:
        plan = cpu_plan(tier, loaded, settings, node_bytes=memory.total_bytes, packs_16_bit=packs_16_bit())
    except ValueError as error:
        raise EngineStartError(str(error)) from error
    verdict = judge_cpu(plan, total_bytes=memory.total_bytes, available_bytes=memory.available_bytes)
    if not verdict.fits:
        kind = EngineStartError if verdict.permanent else EngineError
        raise kind(f"the launch does not fit: {verdict.reason}. The smallest change: {verdict.remedy}")
    return LaunchCheck(
        True,
        f"{gib(plan.total_bytes)} of {gib(memory.available_bytes)} available; KV cache for "
        f"{plan.kv_tokens:,} tokens",
    )


def _check_llamacpp(tier: TierConfig, loaded: LoadedModel) -> LaunchCheck:
    memory = node_memory()
    weights, kv, tokens = llamacpp_bytes(tier, loaded)
    if weights + kv > memory.total_bytes:
        raise EngineStartError(
            f"the launch does not fit: weights {gib(weights)} and KV cache {gib(kv)} for {tokens} "
            f"tokens, the machine has {gib(memory.total_bytes)}. The smallest change: a smaller ctx-size"
        )
    return LaunchCheck(True, f"weights {gib(weights)}, KV cache {gib(kv)}")


def _chosen(samples: Sequence[GpuSample], gpu_ids: Sequence[str]) -> list[GpuSample]:
    if not gpu_ids:
        return list(samples)
    wanted = set(gpu_ids)
    return [s for s in samples if {str(s.info.index), s.info.uuid, s.info.uuid[:12]} & wanted]


def _check_gpus(loaded: LoadedModel, settings: EngineArgs, samples: Sequence[GpuSample]) -> LaunchCheck:
    if not samples:
        _check_divisibility(loaded, settings)
        return LaunchCheck(False, "memory was not checked: the driver shows none of the tier's GPUs")
    text = ""
    for gpu, sample in identified_gpus(samples):
        exact = judge(plan_memory(loaded.spec, settings, gpu, loaded.extra, estimates=False))
        estimated = judge(
            plan_memory(loaded.spec, settings, gpu, loaded.extra),
            FitLimits(quantizations=("fp8", "int8", "awq", "gptq")),
        )
        if isinstance(exact, Unfit):
            remedy = estimated.remedy if isinstance(estimated, Unfit) else exact.remedy
            raise EngineStartError(
                f"the launch does not fit {gpu.name}: {'; '.join(exact.reasons)}. "
                f"The smallest change: {remedy}"
            )
        _check_free(settings, gpu, sample)
        if isinstance(estimated, Unfit):
            text = f"tight on {gpu.name}: {'; '.join(estimated.reasons)} (estimated)"
        elif not text:
            text = f"KV cache for about {estimated.plan.kv_tokens:,} tokens on {gpu.name}"
    return LaunchCheck(True, text)


def _check_divisibility(loaded: LoadedModel, settings: EngineArgs) -> None:
    wrong = divisibility(loaded.spec, settings)
    if wrong:
        raise EngineStartError("the launch does not fit: " + "; ".join(wrong))


def gpu_samples(reader: GpuReader | None = None) -> tuple[GpuSample, ...]:
    """One sample of each of this machine's GPUs, read with ``reader`` or a temporary one."""
    if reader is not None:
        return reader.read()
    with contextlib.closing(GpuReader()) as own:
        return own.read()


def identified_gpus(samples: Sequence[GpuSample]) -> list[tuple[GpuModel, GpuSample]]:
    """Each GPU whose name and memory are known, with its model: from the table if the driver shows the same
    memory, else from the driver's figures."""
    found = []
    for sample in samples:
        info = sample.info
        if isinstance(info.name, Missing) or isinstance(sample.memory_total_bytes, Missing):
            continue
        capability = 80
        if not isinstance(info.compute_capability, Missing):
            capability = info.compute_capability[0] * 10 + info.compute_capability[1]
        mib = sample.memory_total_bytes // (1024 * 1024)
        known = find_gpu(gpu_table(), info.name)
        if known is None or abs(known.memory_mib - mib) > 0.02 * mib:
            known = unlisted_gpu(info.name, mib, capability)
        found.append((known, sample))
    return found


def _check_free(settings: EngineArgs, gpu: GpuModel, sample: GpuSample) -> None:
    """Raise EngineError if less memory is free than the engine's share of the GPU, because vLLM would
    exit."""
    free = sample.memory_free_bytes
    if isinstance(free, Missing) or settings.kv_cache_bytes:
        return
    wanted = settings.memory_ratio * gpu.usable_bytes
    if free < wanted:
        ratio = int(free / gpu.usable_bytes * 100) / 100
        raise EngineError(
            f"GPU {sample.info.index} has {gib(free)} free, the engine wants {gib(wanted)} "
            f"(gpu-memory-utilization {settings.memory_ratio:g}): end the programs that use the rest, or set "
            f"gpu-memory-utilization to {max(ratio, 0.01):g}"
        )
