"""What ``configs/*.yaml`` may say, and how such a file is read with every error reported at once."""

from __future__ import annotations

from controlplane.config.plane import (
    BUNDLED_MODELS,
    BUNDLED_PREFIX,
    IMPORT_PATH,
    ArgScalar,
    ControllerConfig,
    EngineKind,
    GatewayConfig,
    PlaneConfig,
    RestartConfig,
    Strict,
    TierConfig,
)

__all__ = [
    "BUNDLED_MODELS",
    "BUNDLED_PREFIX",
    "IMPORT_PATH",
    "ArgScalar",
    "ControllerConfig",
    "EngineKind",
    "GatewayConfig",
    "PlaneConfig",
    "RestartConfig",
    "Strict",
    "TierConfig",
]
