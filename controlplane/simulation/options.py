"""Settings of a simulation that are in neither the configuration nor the trace."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.domain.slo import Slo


@dataclass(frozen=True, slots=True)
class Options:
    """Settings that a configuration doesn't have."""

    gpu: str | None = None
    """The GPU model of ``vllm`` tiers; ignored if nodes are given."""
    engine_ratio: float = 0.8
    """Share of the roofline's speed that engines reach; the scaler starts with the roofline's speed."""
    cold_start_s: float = 60.0
    mtbf_hours: float | None = None
    node_mtbf_hours: float | None = None
    node_recovery_s: float = 600.0
    cost_per_gpu_hour: float = 0.0
    min_replicas: int | None = None
    """None means the value of the tier's ``scaling``, or 1."""
    max_replicas: int | None = None
    """None means the value of the tier's ``scaling``, or 64."""
    slo: Slo | None = None
    """None means each tier's own."""
    itl_s: float = 0.05
    """Time per token of an engine whose speed is unknown."""
    prefill_tokens_per_s: float = 500.0
    """Prompt tokens per second of an engine whose speed is unknown."""
    tick_s: float = 5.0
    """Interval at which targets are computed."""
    seed: int = 0
