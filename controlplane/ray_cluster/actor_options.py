"""What Ray is told to reserve for one replica of a tier: for the deployment, and for ``tierplane plan``."""

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
"""How Ray takes its accelerator type from the driver's name of a GPU (2.60); names that are not like this are
taken whole."""


def actor_options(tier: TierConfig, gpu_kinds: Iterable[str] = ()) -> dict[str, Any]:
    """``ray_actor_options`` of the tier's deployment.

    One actor's GPUs are always on one node, so no placement group is needed for tensor parallelism. An engine
    that may be on several nodes reserves its GPUs itself; its replica, which holds none, has to be on a node
    that has GPUs all the same: one of ``gpu_kinds``, the accelerator types that there are.
    """
    options: dict[str, Any] = {"num_cpus": tier.cpus, "num_gpus": tier.gpus}
    kinds = ray_types(tier.gpu_models)
    if tier.pipeline_across_nodes and not kinds:
        kinds = sorted(set(gpu_kinds))
    if kinds:
        options["label_selector"] = {ACCELERATOR_LABEL: f"in({', '.join(kinds)})"}
    return options


def ray_types(gpu_models: Iterable[str]) -> list[str]:
    """Ray's accelerator types of these GPU models; it tells no memory sizes apart."""
    return sorted({kind for model in gpu_models if (kind := _ray_type(model))})


def cluster_gpu_kinds() -> tuple[str, ...]:
    """The accelerator types of the Ray that this process is connected to; empty if to none."""
    # Ray reads how to authenticate when it is imported, and `tierplane plan` learns that first.
    import ray

    if not ray.is_initialized():
        return ()
    labels = [node.get("Labels", {}) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return tuple(sorted({kind for each in labels if (kind := each.get(ACCELERATOR_LABEL))}))


def _ray_type(model: str) -> str:
    known = find_gpu(gpu_table(), model)
    if known is None or not known.nvml_name:
        return ""
    match = _CAPITALS.match(known.nvml_name)
    if match and len(match[1]) > 1:
        return match[1].replace(" ", "-")
    return known.nvml_name.removeprefix("NVIDIA ").strip().replace(" ", "-")
