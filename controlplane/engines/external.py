"""Engine ``endpoint``: an OpenAI-compatible server elsewhere, which tierplane neither starts nor stops.

Examples are Ollama, Foundry Local, vLLM on another machine, and a model in the cloud. It is ready when
``/v1/models`` responds. Its metrics are not read, because nothing is known about the software behind it.
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
    """A server at a URL that tierplane does not run."""

    kind: ClassVar[str] = "endpoint"
    has_process: ClassVar[bool] = False
    ready_path: ClassVar[str] = "/v1/models"
    metrics_path: ClassVar[str] = ""
    metric_names: ClassVar[MetricNames] = MetricNames()

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """Raises EngineStartError: there is no process to start."""
        raise EngineStartError(f"tier '{tier.name}' has engine 'endpoint': there is no process to start")

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """Chat and completions; nothing else is certain."""
        return Capabilities()

    def phase(self, line: str) -> str | None:
        """None: there is no output to read."""
        return None

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """The last line; there is no output to read other than the probe's errors."""
        return Diagnosis(lines[-1] if lines else "the address does not respond", last_lines=tuple(lines))


def address_of(tier: TierConfig) -> tuple[str, str]:
    """The URL up to ``/v1``, without a trailing slash, and the API key to send there.

    Raises EngineStartError if the tier has no URL, or if the environment variable for its key is not set or
    can't be sent.
    """
    if not tier.url:
        raise EngineStartError(f"tier '{tier.name}' needs 'url'")
    url = tier.url.rstrip("/").removesuffix("/v1")
    if not tier.api_key_env:
        return url, ""
    key = os.environ.get(tier.api_key_env, "").strip()
    if not key:
        raise EngineStartError(
            f"the environment variable {tier.api_key_env}, which holds the API key of tier '{tier.name}' "
            f"(api_key_env), is not set: set it where Ray is started"
        )
    if not (key.isascii() and key.isprintable()):
        raise EngineStartError(
            f"the value of the environment variable {tier.api_key_env} (api_key_env of tier '{tier.name}') "
            "has characters that no HTTP header can have, such as a line break: remove them"
        )
    return url, key
