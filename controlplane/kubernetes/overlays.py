"""The kinds of cluster that ``k8s/overlays`` is written for: what differs between their RayServices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

IMAGE: Final = "ghcr.io/tierplane/tierplane"
"""Built from ``k8s/docker``; ``images:`` in an overlay's kustomization names your registry instead."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """What the nodes are like, and how much may be added."""

    name: str
    about: str
    tag: str
    gpu: str | None
    """The GPU model of its nodes (as ``tierplane fit --gpus`` lists them); None: no GPUs."""
    gpus_per_node: int
    autoscale: bool
    """Whether KubeRay's autoscaler adds pods when Serve asks for more replicas."""
    surge_ratio: float
    """How many pods of a group there may be, against those that the configuration needs."""
    redis: bool
    """Whether the head's tables survive it, in Redis."""


OVERLAYS: Final[Mapping[str, Overlay]] = {
    overlay.name: overlay
    for overlay in (
        Overlay(
            "dev-cpu", "a cluster without GPUs, for trying things", tag="0.1.0-cpu",
            gpu=None, gpus_per_node=0, autoscale=False, surge_ratio=1.0, redis=False,
        ),
        Overlay(
            "production", "nodes with a few GPUs of 24 GB", tag="0.1.0-gpu",
            gpu="L4", gpus_per_node=4, autoscale=True, surge_ratio=2.0, redis=True,
        ),
        Overlay(
            "multi-node", "nodes with eight GPUs of 80 GB", tag="0.1.0-gpu",
            gpu="H100-80G", gpus_per_node=8, autoscale=True, surge_ratio=1.5, redis=True,
        ),
    )
}  # fmt: skip
"""By the name of the folder in ``k8s/overlays``."""
