"""Which GPU model a tier's engines are assumed to run on until their speed has been measured, if the
configuration doesn't say: the most frequent model among the tier's own GPUs, else among the cluster's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controlplane.core.cluster.tier_spec import TierSpec

Counts = Mapping[str, int]
"""GPU model, by its name in the table of GPU models → number of GPUs."""


def assumed_gpu(spec: TierSpec, before: str, held: Counts, reported: Counts) -> str:
    """The GPU model that the tier's engines are assumed to run on; empty if no model's speed is known.

    The model assumed ``before`` stays while the tier holds one such GPU, or none whose speed is known: a
    change makes the controller discard what it has learned about the tier. ``held`` are the GPUs of the
    tier's replicas, ``reported`` all that node agents report.
    """
    speeds = dict(spec.scaling.gpu_priors) if spec.scaling is not None else {}
    known_held = {name: count for name, count in held.items() if name in speeds and count > 0}
    if before in speeds and (before in known_held or not known_held):
        return before
    choice = known_held or {name: count for name, count in reported.items() if name in speeds and count > 0}
    return max(sorted(choice), key=lambda name: choice[name], default="")


def assuming_gpu(spec: TierSpec, gpu: str) -> TierSpec:
    """The tier with that GPU model's speed assumed; unchanged if the model's speed is unknown."""
    speed = dict(spec.scaling.gpu_priors).get(gpu) if spec.scaling is not None else None
    if spec.scaling is None or speed is None:
        return spec
    return replace(spec, scaling=replace(spec.scaling, rule=replace(spec.scaling.rule, prior=speed)))
