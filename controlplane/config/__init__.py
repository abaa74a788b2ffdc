"""The settings of ``configs/*.yaml``, and reading such a file with all errors reported at once."""

from __future__ import annotations

from controlplane.config.loading import ServeFile, load_plane, parse_plane
from controlplane.config.model_identity import BUNDLED_PREFIX
from controlplane.config.plane import (
    BUNDLED_MODELS,
    IMPORT_PATH,
    ArgScalar,
    ControllerConfig,
    EngineKind,
    GatewayConfig,
    Name,
    NonNegative,
    PlaneConfig,
    Port,
    Positive,
    QueueConfig,
    RestartConfig,
    RetryConfig,
    TierConfig,
)
from controlplane.config.strict import Strict

__all__ = [
    "BUNDLED_MODELS",
    "BUNDLED_PREFIX",
    "IMPORT_PATH",
    "ArgScalar",
    "ControllerConfig",
    "EngineKind",
    "GatewayConfig",
    "Name",
    "NonNegative",
    "PlaneConfig",
    "Port",
    "Positive",
    "QueueConfig",
    "RestartConfig",
    "RetryConfig",
    "ServeFile",
    "Strict",
    "TierConfig",
    "load_plane",
    "parse_plane",
]
