"""The small interface behind which every engine stands.

An engine is described, not wrapped: a command line, how to see that it is ready, what it can do, what
its metrics are called, and how to read its output when it fails.
:mod:`controlplane.engines.supervision.supervisor` does the rest, the same for all kinds. A new kind is one
file here plus one line in :mod:`controlplane.engines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import Capabilities


@dataclass(frozen=True, slots=True)
class Launch:
    """What a supervisor decides for one engine process."""

    host: str
    port: int
    secret: str = field(repr=False)
    """Bearer token the process must demand; goes into its environment, never on its command line."""
    model: str
    """The resolved model: a hub id or a local path."""
    gpu_ids: tuple[str, ...] = ()
    """Values for ``CUDA_VISIBLE_DEVICES`` (indices or UUIDs); empty: leave the environment as it is."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start: arguments without a secret, and what to add to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine failed, for people, and whether starting it again can help."""

    summary: str
    """One sentence with the cause and the remedy."""
    permanent: bool = False
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricNames:
    """The engine's own names (Prometheus) for what the control plane reads; empty: not available."""

    running: str = ""
    waiting: str = ""
    kv_usage_ratio: str = ""
    generation_tokens_total: str = ""
    prompt_tokens_total: str = ""
    prefix_hits_total: str = ""
    prefix_queries_total: str = ""
    success_total: str = ""


class Engine(Protocol):
    """One kind of engine. Instances hold no state: everything comes with the tier's configuration."""

    kind: ClassVar[str]
    has_process: ClassVar[bool]
    """False for an address that runs elsewhere: nothing to start or stop."""
    ready_path: ClassVar[str]
    """GET here answers 200 once the engine serves requests (with the secret sent)."""
    metrics_path: ClassVar[str]
    """Prometheus text; empty if the engine has none."""
    metric_names: ClassVar[MetricNames]

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """The process that serves ``tier`` as ``launch`` says."""
        ...

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """What the engine can do with this tier's settings."""
        ...

    def phase(self, line: str) -> str | None:
        """The start-up phase that a line of output announces, for people; None if it announces none."""
        ...

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """Why it failed, from the last lines of output; ``exit_code`` is negative for a signal."""
        ...
