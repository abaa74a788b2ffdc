"""Which GPU model each tier's engines are assumed to run on until their speed was measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from controlplane.config.gpu_models import table_name
from controlplane.core.cluster.assumed_gpu import assumed_gpu, assuming_gpu
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.telemetry.samples import Missing

CHECK_INTERVAL_S: Final = 10.0
"""How often the GPU models of the cluster are read again."""


class AssumedGpus:
    """The assumed model by tier; the rule is :func:`~controlplane.core.cluster.assumed_gpu.assumed_gpu`'s."""

    def __init__(self) -> None:
        self._by_tier: dict[str, str] = {}
        """Tier → GPU model; empty until a model of known speed is found."""
        self._checked_s = -CHECK_INTERVAL_S

    def applied(self, specs: Sequence[TierSpec]) -> list[TierSpec]:
        """The tiers, each with the speed of its assumed GPU. All other tiers are dropped."""
        self._by_tier = {spec.name: self._by_tier.get(spec.name, "") for spec in specs}
        return [assuming_gpu(spec, self._by_tier[spec.name]) for spec in specs]

    def update(
        self, specs: Sequence[TierSpec], endpoints: Iterable[Endpoint], inventory: GpuInventory, now_s: float
    ) -> dict[str, str]:
        """Tier → the GPU model that it is assumed to run on from now on, where that changed. Checks at most
        once per :data:`CHECK_INTERVAL_S`."""
        if now_s - self._checked_s < CHECK_INTERVAL_S:
            return {}
        self._checked_s = now_s
        if not any(spec.scaling is not None and spec.scaling.gpu_priors for spec in specs):
            return {}
        models = {uuid: _model(inventory, uuid) for uuid in inventory.records}
        present = Counter(models.values())
        own: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for endpoint in endpoints:
            own[endpoint.tier].update(models.get(uuid, "") for uuid in endpoint.gpu_uuids)
        changed = {}
        for spec in specs:
            before = self._by_tier.get(spec.name, "")
            gpu = assumed_gpu(spec, before, own[spec.name], present)
            if gpu != before:
                changed[spec.name] = gpu
        self._by_tier |= changed
        return changed


def _model(inventory: GpuInventory, uuid: str) -> str:
    """The GPU's name in the table of models, or the driver's name; empty if the driver does not say."""
    name = inventory.sample(uuid).info.name
    return "" if isinstance(name, Missing) else table_name(name)
