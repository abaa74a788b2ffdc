"""Engine ``endpoint``: an OpenAI-compatible address that runs elsewhere; nothing to start or stop.

Ollama, Foundry Local, another machine's vLLM, a model in the cloud. Readiness is that ``/v1/models``
answers; its metrics are not read, for nothing is known about what serves it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import Capabilities
from controlplane.engines.base import Command, Diagnosis, Launch, MetricNames
from controlplane.errors import EngineStartError


class ExternalEngine:
    """Somebody else's engine."""

    kind: ClassVar[str] = "endpoint"
    has_process: ClassVar[bool] = False
    ready_path: ClassVar[str] = "/v1/models"
    metrics_path: ClassVar[str] = ""
    metric_names: ClassVar[MetricNames] = MetricNames()

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """There is none; raises EngineStartError."""
        raise EngineStartError(f"tier '{tier.name}' is an address: there is no process to start")

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """Chat and completions; nothing more can be taken for granted."""
        return Capabilities()

    def phase(self, line: str) -> str | None:
        """There is no output to read."""
        return None

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """There is no output to read; the probe's own words are the diagnosis."""
        return Diagnosis(lines[-1] if lines else "the address does not answer", last_lines=tuple(lines))


def address_of(tier: TierConfig) -> tuple[str, str]:
    """The address in front of ``/v1`` without a trailing slash, and the key to send there.

    Raises EngineStartError if the tier has no address or its key's variable is not set.
    """
    if not tier.url:
        raise EngineStartError(f"tier '{tier.name}' needs 'url'")
    url = tier.url.rstrip("/").removesuffix("/v1")
    if not tier.api_key_env:
        return url, ""
    key = os.environ.get(tier.api_key_env, "")
    if not key:
        raise EngineStartError(
            f"tier '{tier.name}' takes its key from the environment variable {tier.api_key_env}, "
            f"which is not set: set it where Ray is started"
        )
    return url, key
