"""The kinds of engine that can serve a tier's model. Each is one entry in :data:`ENGINES`.

Importing this package starts nothing, and imports neither torch nor an engine's own package.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from controlplane.config import TierConfig
from controlplane.engines.base import Engine
from controlplane.engines.external import ExternalEngine
from controlplane.engines.llamacpp import LlamaCppEngine
from controlplane.engines.simulated.engine import SimulatedEngine
from controlplane.engines.vllm import VllmEngine

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "vllm": VllmEngine(),
        "llamacpp": LlamaCppEngine(),
        "endpoint": ExternalEngine(),
        "simulated": SimulatedEngine(),
    }
)
"""Every kind of engine, by its name in a tier's setting ``engine``."""


def engine_for(tier: TierConfig) -> Engine:
    """The engine that serves ``tier``."""
    return ENGINES[tier.engine]
