"""The kinds of cluster that ``k8s/overlays`` is generated for, and how their RayServices differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

IMAGE: Final = "ghcr.io/tierplane/tierplane"
"""Built from ``k8s/docker``; ``images:`` in an overlay's kustomization replaces it by your own registry."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """The nodes of one kind of cluster, and how far it may grow."""

    name: str
    tag: str
    """Of the image."""
    gpu: str | None
    """The GPU model of the nodes, as ``tierplane fit --gpus`` lists it; None if they have no GPUs."""
    gpus_per_node: int
    autoscale: bool
    """Whether KubeRay's autoscaler adds pods when Serve asks for more replicas."""
    surge_ratio: float
    """The most pods of a group, as a multiple of those that the configuration needs."""
    redis: bool
    """Whether the head's tables are stored in Redis, so that they survive the head pod."""


OVERLAYS: Final[Mapping[str, Overlay]] = {
    overlay.name: overlay
    for overlay in (
        Overlay(
            "dev-cpu",  # a cluster without GPUs, for experiments
            tag="0.1.0-cpu",
            gpu=None, gpus_per_node=0, autoscale=False, surge_ratio=1.0, redis=False,
        ),
        Overlay(
            "production",  # nodes with a few GPUs of 24 GB
            tag="0.1.0-gpu",
            gpu="L4", gpus_per_node=4, autoscale=True, surge_ratio=2.0, redis=True,
        ),
        Overlay(
            "multi-node",  # nodes with eight GPUs of 80 GB
            tag="0.1.0-gpu",
            gpu="H100-80G", gpus_per_node=8, autoscale=True, surge_ratio=1.5, redis=True,
        ),
    )
}  # fmt: skip
"""By the name of their folder in ``k8s/overlays``."""
