"""Serve's autoscaling policy for every tier: the number of replicas in the controller's target.

Serve copies a policy's module by value into its checkpoints. So state that can't be copied or must be shared
is in :mod:`controlplane.controller.targets_client`.
"""

from __future__ import annotations

from typing import Any, Final

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from controlplane.config import TierConfig

SURGE: Final = 1
"""Replicas that a tier may have beyond its maximum while one of them migrates."""


class TargetPolicy:
    """Called by Serve's own controller for one tier, several times a second. It never waits."""

    def __init__(self, tier: str, replicas: int, namespace: str, scales: bool = False) -> None:
        from controlplane.controller.targets_client import tier_targets

        self._tier = tier
        self._targets = tier_targets(tier, replicas, namespace, scales=scales)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas to run, and an empty state."""
        running = {f"{self._tier}-{replica.unique_id}" for replica in context.running_replicas}
        return self._targets.desired(running, context.target_num_replicas), {}


def autoscaling(tier: TierConfig, namespace: str) -> AutoscalingConfig:
    """Serve's settings for a tier: it starts with the configured replicas, may have up to its maximum plus
    :data:`SURGE`, and has none while it is drained."""
    return AutoscalingConfig(
        min_replicas=0,
        initial_replicas=tier.replicas,
        max_replicas=tier.ceiling + SURGE,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function="deployments.autoscaling_policy:TargetPolicy",
            policy_kwargs={
                "tier": tier.name,
                "replicas": tier.replicas,
                "namespace": namespace,
                "scales": tier.scaling is not None,
            },
        ),
    )
