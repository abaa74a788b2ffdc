"""An estimate of an engine's speed from memory bandwidth and arithmetic rate alone (the roofline model).

Prefill is bound by arithmetic, decode by reading weights and KV cache, each at a stated share of the GPU's
published peak; batch sizes follow from Little's law. Real speeds depend on kernels, prompts and prefix hits:
these figures are a prior, to be replaced by measurements of the running tier.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from controlplane.core.domain.request import RequestShape
from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.gpu_models import GpuModel
from controlplane.core.sizing.kv_cache import page_bytes
from controlplane.core.sizing.quantization import DTYPE_BYTES
from controlplane.core.sizing.weights import stages, weight_terms

COMPUTE_RATIO = 0.5
"""Share of the dense peak that prefill reaches (large matrix products run at 0.4 to 0.7 of it)."""

BANDWIDTH_RATIO = 0.7
"""Share of the memory bandwidth that decode reaches."""

LINK_RATIO = 0.7
"""Share of the NVLink or PCIe rate that an all-reduce reaches."""

PCIE_BYTES_PER_S = 64e9
"""Both directions of PCIe 4.0 x16, between GPUs without NVLink."""

ALL_REDUCE_S = {True: 8e-6, False: 25e-6}
"""Start-up time of one all-reduce, with and without NVLink."""

STEP_OVERHEAD_S = 1.5e-3
"""Time per step for scheduling, sampling and detokenising that doesn't overlap with the GPU's work."""

_ITERATIONS = 40


@dataclass(frozen=True, slots=True)
class LatencyTargets:
    """Upper bounds of a tier's mean latencies."""

    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """One replica at one request rate."""

    requests_per_s: float
    batch: float
    """Mean number of sequences that decode at once."""
    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """An engine's speed as functions of batch and length; made by :func:`roofline`."""

    rate: float
    """Arithmetic operations per second over all tensor-parallel ranks."""
    bandwidth_bytes_per_s: float
    """Bandwidth of one GPU."""
    pp: int
    matrix_flops: float
    """Operations per token in all matrices except the output head."""
    head_flops: float
    """Operations per token in the output head."""
    attention_flops: float
    """Operations per layer, token and attended token."""
    dense_bytes: float
    """Weights that every step reads on one rank, over all stages."""
    expert_bytes: float
    """Weights of all experts on one rank, over all stages."""
    expert_ratio: float
    """Share of the experts that one token uses."""
    kv_bytes: float
    """KV cache per layer and token, on one rank."""
    layers: tuple[tuple[int, int], ...]
    """(window in tokens, or 0 for full attention; number of layers)."""
    communication_s: float
    """Communication between GPUs, per step."""
    communication_s_per_token: float

    def prefill_s(self, tokens: float) -> float:
        """Time to process a prompt of ``tokens`` tokens while nothing else runs."""
        # Causal attention: on average a token attends to half of the prompt, at most to its window.
        attended = sum(tokens * min(tokens / 2, window or tokens) * n for window, n in self.layers)
        work = self.matrix_flops * tokens + self.head_flops + self.attention_flops * attended
        return work / self.rate + self._communication_s(tokens) + STEP_OVERHEAD_S

    def step_s(self, batch: float, context: float) -> float:
        """Time of one decode step for ``batch`` sequences of ``context`` tokens each.

        With pipeline parallelism a token passes through all stages, each of which works on its share of the
        batch.
        """
        share = batch / self.pp
        touched = 1 - math.pow(1 - self.expert_ratio, max(share, 1.0))
        cached = self.kv_bytes * sum(min(context, window or context) * n for window, n in self.layers)
        read = self.dense_bytes + self.expert_bytes * touched + share * cached
        memory = read / self.bandwidth_bytes_per_s
        compute = (self.matrix_flops + self.head_flops) * share / self.rate
        return max(memory, compute) + self._communication_s(share) + STEP_OVERHEAD_S

    def _communication_s(self, tokens: float) -> float:
        return self.communication_s + self.communication_s_per_token * tokens

    def speed(self, request: RequestShape, requests_per_s: float) -> ReplicaSpeed:
        """The latencies of one replica at ``requests_per_s`` for requests of this shape; infinite if the
        replica is overloaded.

        Prompts take a share of the time, which makes decode steps longer. The number of decoding sequences is
        arrivals x output tokens x time per token (Little's law), and a prompt waits for the prompts before it
        as in an M/D/1 queue.
        """
        prefill = self.prefill_s(request.input_tokens)
        busy = requests_per_s * prefill / self.pp
        if busy >= 1:
            return ReplicaSpeed(requests_per_s, math.inf, math.inf, math.inf)
        context = request.input_tokens + request.output_tokens / 2
        tokens_per_s = requests_per_s * request.output_tokens
        batch = 0.0
        itl = self.step_s(1, context)
        for _ in range(_ITERATIONS):
            batch = tokens_per_s * itl
            itl = self.step_s(max(batch, 1.0), context) / (1 - busy)
            if itl > 1e3:
                return ReplicaSpeed(requests_per_s, math.inf, math.inf, math.inf)
        wait = busy / (2 * (1 - busy)) * prefill
        ttft = wait + prefill + itl / 2
        return ReplicaSpeed(requests_per_s, batch, ttft * 1e3, itl * 1e3)

    def capacity(self, request: RequestShape, slo: LatencyTargets, max_sequences: int) -> ReplicaSpeed:
        """One replica at the highest rate that meets the SLO; the rate is 0 if not even a single request at a
        time meets it."""

        def meets_slo(speed: ReplicaSpeed) -> bool:
            return (
                speed.ttft_ms <= slo.ttft_ms
                and speed.itl_ms <= slo.itl_ms
                and speed.batch <= max_sequences
                and speed.batch < math.inf
            )

        idle = self.speed(request, 0.0)
        if not meets_slo(idle) or max_sequences < 1:
            return idle
        low, high = 0.0, self.pp / self.prefill_s(request.input_tokens)
        for _ in range(_ITERATIONS):
            middle = (low + high) / 2
            if meets_slo(self.speed(request, middle)):
                low = middle
            else:
                high = middle
        return self.speed(request, low)


def roofline(model: ModelSpec, settings: EngineArgs, gpu: GpuModel) -> Roofline:
    """The speed of an engine on GPUs of that model. ValueError if the GPU's speed is unknown."""
    dtype = settings.resolved_dtype(model, gpu.default_dtype)
    rate = gpu.flops_for(settings.weights_format(model).scheme, dtype)
    if not rate or not gpu.bandwidth_bytes_per_s:
        raise ValueError(f"the speed of {gpu.name} is unknown")
    dense = experts = 0.0
    for stage in stages(model, settings.pp):
        for term in weight_terms(model, settings, stage, dtype):
            if term.name == "weights: experts":
                experts += term.size_bytes
            elif term.name == "weights: embedding":
                # A lookup reads single rows; a tied embedding is read completely as the output head.
                dense += term.size_bytes if model.tied and stage.last else 0
            elif term.name.startswith("weights"):
                dense += term.size_bytes
    head = 2.0 * model.head().params
    windows = Counter(kind.window for kind in model.layers)
    width = model.heads * (model.mla.v_head_dim if model.mla else model.head_dim)
    fixed, per_token = _communication(model, settings, gpu, dtype)
    moe = model.moe
    return Roofline(
        rate=rate * COMPUTE_RATIO * settings.tp,
        bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s * BANDWIDTH_RATIO,
        pp=settings.pp,
        matrix_flops=2.0 * model.active_params - head,
        head_flops=head,
        attention_flops=4.0 * width,
        dense_bytes=dense,
        expert_bytes=experts,
        expert_ratio=moe.experts_per_token / moe.experts if moe else 1.0,
        kv_bytes=page_bytes(model, settings.tp, 1, settings.kv_bytes(model, dtype)),
        layers=tuple(windows.items()),
        communication_s=fixed,
        communication_s_per_token=per_token,
    )


def _communication(model: ModelSpec, settings: EngineArgs, gpu: GpuModel, dtype: str) -> tuple[float, float]:
    """Seconds (per step, per token): two all-reduces per layer between ranks, one transfer between stages."""
    size = model.hidden * DTYPE_BYTES[dtype]
    linked = gpu.nvlink_bytes_per_s > 0
    # A rank sends over one direction of the link.
    rate = (gpu.nvlink_bytes_per_s or PCIE_BYTES_PER_S) / 2 * LINK_RATIO
    fixed = per_token = 0.0
    if settings.tp > 1:
        times = 2 * len(model.layers)
        fixed += times * ALL_REDUCE_S[linked]
        per_token += times * 2 * (settings.tp - 1) / settings.tp * size / rate
    if settings.pp > 1:
        fixed += (settings.pp - 1) * ALL_REDUCE_S[False]
        per_token += (settings.pp - 1) * size / (PCIE_BYTES_PER_S / 2 * LINK_RATIO)
    return fixed, per_token
