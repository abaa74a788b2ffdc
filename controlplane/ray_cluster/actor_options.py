"""The resources that Ray reserves for one replica of a tier: for its deployment, and for ``tierplane
plan``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from controlplane.config import TierConfig
from controlplane.core.sizing.gpu_models import find_gpu
from controlplane.models.catalog import gpu_table

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Ray sets it on each node that has GPUs."""
_CAPITALS = re.compile(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)")
"""The part of the driver's name of a GPU that Ray 2.60 uses as accelerator type; it uses the whole name if
that does not match."""


def actor_options(tier: TierConfig, cluster_types: Iterable[str] = ()) -> dict[str, Any]:
    """``ray_actor_options`` of the tier's deployment.

    The GPUs of one actor are always on one node, so tensor parallelism needs no placement group. An engine
    that may span several nodes reserves its GPUs itself. Its replica reserves none but must still be on a
    node with GPUs: one of ``cluster_types``, the accelerator types of the cluster.
    """
    options: dict[str, Any] = {"num_cpus": tier.cpus, "num_gpus": tier.gpus}
    types = accelerator_types(tier.gpu_models)
    if tier.pipeline_across_nodes and not types:
        types = sorted(set(cluster_types))
    if types:
        options["label_selector"] = {ACCELERATOR_LABEL: f"in({', '.join(types)})"}
    return options


def accelerator_types(gpu_models: Iterable[str]) -> list[str]:
    """Ray's accelerator types of these GPU models; models that differ only in memory have the same type."""
    return sorted({found for model in gpu_models if (found := _accelerator_type(model))})


def cluster_accelerator_types() -> tuple[str, ...]:
    """The accelerator types of the Ray that this process is connected to; empty if it is not connected."""
    # Imported late: Ray reads its authentication settings at import, and `tierplane plan` sets them before.
    import ray

    if not ray.is_initialized():
        return ()
    labels = [node.get("Labels", {}) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return tuple(sorted({found for each in labels if (found := each.get(ACCELERATOR_LABEL))}))


def _accelerator_type(model: str) -> str:
    known = find_gpu(gpu_table(), model)
    if known is None or not known.nvml_name:
        return ""
    match = _CAPITALS.match(known.nvml_name)
    if match and len(match[1]) > 1:
        return match[1].replace(" ", "-")
    return known.nvml_name.removeprefix("NVIDIA ").strip().replace(" ", "-")
