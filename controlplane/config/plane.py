"""What ``configs/*.yaml`` may say: strict models that report every error at once.

The file is a Serve config file; tierplane's own settings are the ``args`` of its application
(:class:`PlaneConfig`). :func:`load_plane` reads a file, :func:`parse_plane` reads plain values.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from controlplane.core.domain import Complexity

IMPORT_PATH = "deployments.app:build"
"""The builder that a Serve config file of tierplane names."""

BUNDLED_PREFIX = "bundled:"
BUNDLED_MODELS = ("smollm2-135m",)

EngineKind = Literal["vllm", "llamacpp", "endpoint", "simulated"]
ArgScalar = str | int | float | bool | None
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]

_FLAG = re.compile(r"^[a-z][a-z0-9-]*$")
_SET_BY_TIERPLANE = {
    "model": "model",
    "host": "(set by tierplane)",
    "port": "(set by tierplane)",
    "api-key": "(set by tierplane)",
    "served-model-name": "served_model_name",
    "tensor-parallel-size": "tensor_parallel_size",
    "pipeline-parallel-size": "pipeline_parallel_size",
    "trust-remote-code": "trust_remote_code",
}


class Strict(BaseModel):
    """Unknown keys are errors, values are not coerced between kinds, instances don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RestartConfig(Strict):
    """How a lost engine process is brought back."""

    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts inside ``window_s`` before the replica gives up and reports a diagnosis."""
    window_s: Positive = 600.0
    backoff_initial_s: NonNegative = 0.5
    backoff_max_s: Positive = 30.0
    """The wait doubles from ``backoff_initial_s`` at each restart in the window, up to this."""


class TierConfig(Strict):
    """One tier: a model, the engine that serves it, and what it is for."""

    name: Name
    model: Annotated[str, Field(min_length=1)] = ""
    """A hub id, a local folder or file, or ``bundled:smollm2-135m``. For engine ``endpoint``: the model
    name to send there."""
    engine: EngineKind = "vllm"
    served_model_name: str | None = None
    """The model id clients see and may ask for; by default the last part of ``model``."""
    engine_args: dict[str, ArgScalar | list[ArgScalar]] = Field(default_factory=dict)
    """The engine's own flags without the leading dashes: ``{max-model-len: 4096, enforce-eager: true}``.
    For engine ``simulated``: the timing model's settings."""
    env: dict[str, str] = Field(default_factory=dict)
    """Added to the engine process's environment."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Where a ``vllm`` engine runs. The other engines reserve no GPU."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1)] = 1
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of one GPU that a replica takes; under 1 only with no parallelism."""
    cpus: NonNegative = 0.0
    """CPUs that Ray reserves for a replica."""
    replicas: Annotated[int, Field(ge=0)] = 1
    concurrency_limit: Annotated[int, Field(ge=1)] = 10
    """Requests in flight per replica before the tier counts as full."""
    complexities: list[Complexity] | None = None
    """What this tier serves; by default ``lightweight``, ``balanced`` and ``capable`` serve simple,
    moderate and complex."""
    agent_types: list[Name] = Field(default_factory=list)
    """Values of ``agent_type`` that this tier serves."""
    url: str | None = None
    """Engine ``endpoint`` only: the address in front of ``/v1``."""
    api_key_env: str | None = None
    """Engine ``endpoint`` only: the environment variable that holds the address's key."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Off unless you trust it."""
    startup_timeout_s: Positive = 1800.0
    """An engine that is not ready after this long is stopped and counted as a failed start."""
    drain_timeout_s: NonNegative = 60.0
    """How long a stopping replica waits for the requests it runs."""
    health_interval_s: Positive = 2.0
    health_timeout_s: Positive = 5.0
    health_failures: Annotated[int, Field(ge=1)] = 5
    """Failed probes in a row before a running engine counts as hung and is replaced."""
    restart: RestartConfig = RestartConfig()

    @field_validator("complexities", mode="before")
    @classmethod
    def _complexities_by_name(cls, value: Any) -> Any:
        return _enum_list(value, Complexity)

    @field_validator("engine_args")
    @classmethod
    def _flags(cls, value: dict[str, Any]) -> dict[str, Any]:
        for flag in value:
            normal = flag.replace("_", "-")
            if normal in _SET_BY_TIERPLANE:
                raise ValueError(f"'{flag}' is not set here: use {_SET_BY_TIERPLANE[normal]}")
            if not _FLAG.match(normal):
                raise ValueError(f"'{flag}' is no flag name: write it without leading dashes")
        return {flag.replace("_", "-"): item for flag, item in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> TierConfig:
        wrong: list[str] = []
        if self.engine == "endpoint":
            if not self.url:
                wrong.append("engine 'endpoint' needs 'url'")
            elif not re.match(r"^https?://[^/\s]+(/\S*)?$", self.url):
                wrong.append(f"'url' must look like http://host:port, not '{self.url}'")
        else:
            wrong += [
                f"'{key}' is only for engine 'endpoint'"
                for key in ("url", "api_key_env")
                if getattr(self, key)
            ]
        if not self.model and self.engine != "simulated":
            wrong.append("'model' is missing")
        if self.model.startswith(BUNDLED_PREFIX) and self.model[len(BUNDLED_PREFIX) :] not in BUNDLED_MODELS:
            wrong.append(
                f"no bundled model '{self.model}': there is "
                + ", ".join(BUNDLED_PREFIX + m for m in BUNDLED_MODELS)
            )
        if self.gpu_share < 1 and self.world_size > 1:
            wrong.append("'gpu_share' under 1 needs tensor_parallel_size and pipeline_parallel_size 1")
        if self.world_size > 1 and self.engine != "vllm":
            wrong.append(f"engine '{self.engine}' has no tensor or pipeline parallelism")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def world_size(self) -> int:
        """Workers of one engine: tensor × pipeline parallel size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def gpus(self) -> float:
        """GPUs that Ray reserves for one replica."""
        if self.engine != "vllm" or self.device == "cpu":
            return 0.0
        return self.gpu_share if self.world_size == 1 else float(self.world_size)

    @property
    def model_id(self) -> str:
        """The model id that clients see."""
        if self.served_model_name:
            return self.served_model_name
        if not self.model:
            return f"simulated-{self.name}"
        return self.model.removeprefix(BUNDLED_PREFIX).rstrip("/").rsplit("/", 1)[-1]


class GatewayConfig(Strict):
    """The REST interface."""

    host: str = "127.0.0.1"
    """The address the gateway's own port listens on; ``0.0.0.0`` to be reached from other machines."""
    port: Port | Literal[0] = 8080
    """The gateway's own port, shared by the gateway replicas of a node; 0 switches it off."""
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus: NonNegative = 0.0
    """CPUs that Ray reserves for a gateway replica."""
    default_tier: Name | None = None
    """Where ``auto`` goes without a hint; by default ``balanced``, or else the first tier."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    request_timeout_s: Positive = 600.0
    """A request's deadline unless it brings its own."""
    connect_timeout_s: Positive = 2.0


class ControllerConfig(Strict):
    """The controller actor."""

    namespace: Name = "tierplane"
    """The Ray namespace of the named actors; two planes on one cluster need two."""
    heartbeat_s: Positive = 2.0
    """How often replicas and gateways report; five missed reports and an endpoint is dropped."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """``auto``: readable on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class PlaneConfig(Strict):
    """All of tierplane's settings: the ``args`` of the Serve application."""

    tiers: Annotated[list[TierConfig], Field(min_length=1)]
    """From the cheapest to the most capable."""
    gateway: GatewayConfig = GatewayConfig()
    controller: ControllerConfig = ControllerConfig()

    @model_validator(mode="after")
    def _whole(self) -> PlaneConfig:
        wrong: list[str] = []
        names = [tier.name for tier in self.tiers]
        wrong += [
            f"two tiers are named '{name}'" for name in sorted({n for n in names if names.count(n) > 1})
        ]
        owners: dict[str, str] = {}
        for tier in self.tiers:
            for agent_type in tier.agent_types:
                if agent_type in owners:
                    owner = owners[agent_type]
                    wrong.append(f"agent type '{agent_type}' is served by '{owner}' and '{tier.name}'")
                owners[agent_type] = tier.name
        if self.gateway.default_tier and self.gateway.default_tier not in names:
            wrong.append(
                f"gateway.default_tier '{self.gateway.default_tier}' is no tier; there is {', '.join(names)}"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def tier(self, name: str) -> TierConfig:
        """The tier of that name; KeyError if there is none."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise KeyError(name)


def _enum_list(value: Any, kind: Any) -> Any:
    """Strict mode takes enum members only; YAML has strings."""
    if not isinstance(value, list):
        return value
    known = {str(member) for member in kind}
    return [kind(item) if isinstance(item, str) and item in known else item for item in value]
