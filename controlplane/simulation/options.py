"""What a simulation is told beside a configuration and a trace."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.domain.slo import Slo


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration does not say."""

    gpu: str | None = None
    """The GPU model that ``vllm`` tiers run on; not looked at where the nodes are known."""
    engine_ratio: float = 0.8
    """Share of the roofline's speed that engines really reach; the scaler is told the roofline's."""
    cold_start_s: float = 60.0
    cold_start_jitter: float = 0.0
    mtbf_hours: float | None = None
    node_mtbf_hours: float | None = None
    node_recovery_s: float = 600.0
    cost_per_gpu_hour: float = 0.0
    min_replicas: int | None = None
    """None: as the tier's ``scaling`` has it, or 1."""
    max_replicas: int | None = None
    """None: as the tier's ``scaling`` has it, or 64."""
    slo: Slo | None = None
    """None: each tier's own."""
    itl_s: float = 0.05
    """Time per token of an engine whose speed is not known."""
    prefill_tokens_per_s: float = 500.0
    """Of such an engine."""
    tick_s: float = 5.0
    """How often targets are worked out."""
    seed: int = 0
