"""The interface of every kind of engine.

An engine is described, not wrapped: its command line, how to check that it is ready, its capabilities, the
names of its metrics, and how to read its output when it fails. Everything else is the same for all kinds and
done by :mod:`controlplane.engines.supervision.supervisor`. A new kind is one file here plus one entry in
:mod:`controlplane.engines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import Capabilities


@dataclass(frozen=True, slots=True)
class Launch:
    """What the supervisor decides about one engine process."""

    host: str
    port: int
    secret: str = field(repr=False)
    """Bearer token that the process must require. Passed in its environment, never on its command line."""
    model: str
    """The resolved model: a hub id or a local path."""
    gpu_ids: tuple[str, ...] = ()
    """Values for ``CUDA_VISIBLE_DEVICES`` (indices or UUIDs); if empty, the environment stays as it is."""
    cores: int = 0
    """CPU cores for this engine, which shares the machine with others; 0 if nothing is known about them."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start: its arguments, which contain no secret, and additions to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    pass_env: tuple[str, ...] = ()
    """Variables that it gets from the supervisor's environment, in addition to those that every engine
    gets."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine failed, and whether starting it again can help."""

    summary: str
    """One sentence for the operator: the cause and the remedy."""
    permanent: bool = False
    """Whether starting the engine again would fail in the same way."""
    port_taken: bool = False
    """Whether another process has taken the port, so that the engine may start on a different one."""
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricNames:
    """The engine's Prometheus names for the metrics that the control plane reads; empty if not available."""

    running: str = ""
    waiting: str = ""
    kv_usage_ratio: str = ""
    generation_tokens_total: str = ""
    prompt_tokens_total: str = ""
    prefix_hits_total: str = ""
    prefix_queries_total: str = ""
    success_total: str = ""


class Engine(Protocol):
    """One kind of engine. Instances have no state; all they need is in the tier's configuration."""

    kind: ClassVar[str]
    has_process: ClassVar[bool]
    """False for an engine that runs elsewhere, which tierplane neither starts nor stops."""
    ready_path: ClassVar[str]
    """A GET of this path, with the secret, returns 200 once the engine serves requests."""
    metrics_path: ClassVar[str]
    """Path of the metrics in Prometheus' text format; empty if the engine has none."""
    metric_names: ClassVar[MetricNames]

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """The command that serves ``tier`` with the settings in ``launch``."""
        ...

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """What the engine can do with this tier's settings."""
        ...

    def phase(self, line: str) -> str | None:
        """The start-up phase that a line of output shows, in words for the operator; None if it shows
        none."""
        ...

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """Why the engine failed, from the last lines of its output. A negative ``exit_code`` is a signal."""
        ...
