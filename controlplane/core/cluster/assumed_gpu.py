"""Which GPU model a tier's engines are assumed to run on until they were watched, where the configuration
leaves it open: the one that they hold, else the one that there is most of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controlplane.core.cluster.tier_spec import TierSpec

Counts = Mapping[str, int]
"""GPU model, by its name in the table → how many."""


def gpu_assumed(spec: TierSpec, before: str, own: Counts, there: Counts) -> str:
    """The GPU model that the tier's engines are assumed to run on; empty: none that anything is known of.

    What was assumed ``before`` stays while the tier holds one such GPU, or none whose speed is known: another
    model's figures make the controller forget what it learned of the tier. ``own`` are the GPUs that the
    tier's replicas hold, ``there`` all that node agents report.
    """
    speeds = dict(spec.scaling.gpu_priors) if spec.scaling is not None else {}
    mine = {name: count for name, count in own.items() if name in speeds and count > 0}
    if before in speeds and (before in mine or not mine):
        return before
    choice = mine or {name: count for name, count in there.items() if name in speeds and count > 0}
    return max(sorted(choice), key=lambda name: choice[name], default="")


def assuming(spec: TierSpec, gpu: str) -> TierSpec:
    """The tier with that GPU model's speed assumed; as it is if nothing is known of the model."""
    speed = dict(spec.scaling.gpu_priors).get(gpu) if spec.scaling is not None else None
    if spec.scaling is None or speed is None:
        return spec
    return replace(spec, scaling=replace(spec.scaling, rule=replace(spec.scaling.rule, prior=speed)))
