"""Refuses a launch that cannot fit, before the engine starts: with the numbers and the smallest change.

Only what is exact (weights, the KV cache of one full-length sequence, divisibility) refuses a launch on
GPUs; what the estimates add is said but left to the engine's own profile. What can't be known (a model that
isn't on this machine yet, a GPU the driver doesn't show) refuses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from controlplane.config import TierConfig
from controlplane.core.sizing.cpu_memory import judge_cpu
from controlplane.core.sizing.engine_args import SPARING, EngineArgs
from controlplane.core.sizing.feasibility import FitLimits, Unfit, judge
from controlplane.core.sizing.gpu_memory import gib, plan_memory
from controlplane.core.sizing.gpu_models import GpuModel, find_gpu, seen_gpu
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

    known: bool
    """False: it could not be checked; ``text`` says why."""
    text: str


def launchable_model(
    tier: TierConfig, gpu_ids: Sequence[str], model: str, progress: Callable[[str], None]
) -> str:
    """What an engine of ``tier`` is to load for ``model``, once it is known that it is not too large.

    Blocks, for a download perhaps. Raises what :func:`controlplane.models.bundled.resolve` and
    :func:`check_launch` raise.
    """
    found = bundled.resolve(model, tier.engine, progress)
    progress("checking that it fits")
    try:
        check = check_launch(tier, found, gpu_ids)
    except EngineError:
        raise
    except Exception as error:
        # A model too odd for the memory model may still be one that the engine can run.
        log.warning("launch not checked", error=f"{type(error).__name__}: {error}", exc_info=True)
    else:
        log.info("launch checked", known=check.known, found=check.text)
    return found


def check_launch(
    tier: TierConfig, model: str, gpu_ids: Sequence[str] = (), *, reader: GpuReader | None = None
) -> LaunchCheck:
    """Whether an engine of ``tier`` with the resolved ``model`` can fit where it is about to start.

    ``gpu_ids`` are indices or UUIDs as for ``CUDA_VISIBLE_DEVICES``. Blocks for file reads and a few driver
    calls. Raises EngineStartError if it can never fit, EngineError if it doesn't fit beside what runs now.
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
    sparing = ", ".join(f"--{flag}" for flag in settings.unmodelled if flag in SPARING)
    if sparing:
        return LaunchCheck(False, f"memory was not checked: what {sparing} saves is not counted")
    if tier.device == "cpu":
        return _check_cpu(tier, loaded, settings)
    if tier.pipeline_across_nodes:
        _check_cut(loaded, settings)
        return LaunchCheck(False, "memory was not checked: vLLM chooses the GPUs, on several nodes perhaps")
    owned = reader is None
    reader = reader or GpuReader()
    try:
        return _check_gpus(tier, loaded, settings, _chosen(reader.read(), gpu_ids))
    finally:
        if owned:
            reader.close()


def _check_cpu(tier: TierConfig, loaded: LoadedModel, settings: EngineArgs) -> LaunchCheck:
    memory = node_memory()
    try:
        plan = cpu_plan(tier, loaded, settings, node_bytes=memory.total_bytes, packs_16_bit=packs_16_bit())
    except ValueError as error:
        raise EngineStartError(str(error)) from error
    verdict = judge_cpu(plan, total_bytes=memory.total_bytes, available_bytes=memory.available_bytes)
    if not verdict.fits:
        kind = EngineStartError if verdict.lasting else EngineError
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


def _check_gpus(
    tier: TierConfig, loaded: LoadedModel, settings: EngineArgs, samples: Sequence[GpuSample]
) -> LaunchCheck:
    if not samples:
        _check_cut(loaded, settings)
        return LaunchCheck(False, "memory was not checked: the driver shows none of the tier's GPUs")
    text = ""
    for gpu, sample in seen_gpus(samples):
        exact = judge(plan_memory(loaded.spec, settings, gpu, loaded.extra, estimates=False))
        whole = judge(
            plan_memory(loaded.spec, settings, gpu, loaded.extra),
            FitLimits(quantizations=("fp8", "int8", "awq", "gptq")),
        )
        if isinstance(exact, Unfit):
            remedy = whole.remedy if isinstance(whole, Unfit) else exact.remedy
            raise EngineStartError(
                f"the launch does not fit {gpu.name}: {'; '.join(exact.reasons)}. "
                f"The smallest change: {remedy}"
            )
        _check_free(settings, gpu, sample)
        if isinstance(whole, Unfit):
            text = f"tight on {gpu.name}: {'; '.join(whole.reasons)} (estimated)"
        elif not text:
            text = f"KV cache for about {whole.plan.kv_tokens:,} tokens on {gpu.name}"
    return LaunchCheck(True, text)


def _check_cut(loaded: LoadedModel, settings: EngineArgs) -> None:
    wrong = divisibility(loaded.spec, settings)
    if wrong:
        raise EngineStartError("the launch does not fit: " + "; ".join(wrong))


def seen_gpus(samples: Sequence[GpuSample]) -> list[tuple[GpuModel, GpuSample]]:
    """Each GPU as a model: from the table, with the total that the driver shows, or from the driver alone."""
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
            known = seen_gpu(info.name, mib, capability)
        found.append((known, sample))
    return found


def _check_free(settings: EngineArgs, gpu: GpuModel, sample: GpuSample) -> None:
    """vLLM stops at once if less is free than its share of the GPU."""
    free = sample.memory_free_bytes
    if isinstance(free, Missing) or settings.kv_cache_bytes:
        return
    wanted = settings.memory_ratio * gpu.usable_bytes
    if free < wanted:
        ratio = int(free / gpu.usable_bytes * 100) / 100
        raise EngineError(
            f"GPU {sample.info.index} has {gib(free)} free, the engine wants {gib(wanted)} "
            f"(gpu-memory-utilization {settings.memory_ratio:g}): end what holds the rest, or set "
            f"gpu-memory-utilization to {max(ratio, 0.01):g}"
        )
