"""tierplane's own settings, the ``args`` of its Serve application: :class:`PlaneConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from controlplane.config.access import AuthConfig, TlsConfig
from controlplane.config.addresses import (
    CollectorUrl,
    EnvName,
    ListeningHost,
    ServerUrl,
    StorePath,
    VariableName,
    VariableValue,
)
from controlplane.config.alerts import AlertsConfig
from controlplane.config.engine_args import with_dashes
from controlplane.config.expected_load import ExpectedLoad
from controlplane.config.gpu_models import gpu_model_findings, table_name
from controlplane.config.model_identity import BUNDLED_PREFIX, is_local, model_identity, model_label
from controlplane.config.profiles import PROFILES, Scenario, apply_plane_profile, apply_profile
from controlplane.config.reports import ReportsConfig
from controlplane.config.scaling import DEFAULT_MAX, ControllerScalingConfig, ScalingConfig, SloConfig
from controlplane.config.strict import ConfigFinding, FindingsError, Strict
from controlplane.config.vllm_flags import vllm_flag_findings
from controlplane.config.vllm_values import vllm_value_findings
from controlplane.core.domain.request import Complexity
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape
from controlplane.core.routing.tier_table import OverflowDirection, TierPolicy, TierTable, name_problem

IMPORT_PATH = "deployments.app:build"
"""The application builder that a Serve config file names to run tierplane."""

BUNDLED_MODELS = ("smollm2-135m",)


def _not_reserved(owner: str) -> AfterValidator:
    def check(value: str) -> str:
        problem = name_problem(value, owner)
        if problem:
            raise FindingsError([ConfigFinding((), problem, "choose another name")])
        return value

    return AfterValidator(check)


EngineKind = Literal["vllm", "llamacpp", "endpoint", "simulated"]
ArgScalar = str | int | float | bool | None
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
TierName = Annotated[Name, _not_reserved("tier")]
ModelName = Annotated[str, Field(min_length=1, max_length=256), _not_reserved("model")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
HostName = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)$", max_length=253)]
Origin = Annotated[
    str, Field(pattern=r"^(\*|null|[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+)$", max_length=300)
]


class RestartConfig(Strict):
    """How a lost engine process is restarted."""

    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts within ``window_s`` before the replica gives up and reports a diagnosis."""
    window_s: Positive = 600.0
    """Restarts older than this are not counted."""
    backoff_initial_s: NonNegative = 0.5
    """The wait before the first restart in the window."""
    backoff_max_s: Positive = 30.0
    """The longest wait: it doubles from ``backoff_initial_s`` with each restart in the window, up to this."""


class TierConfig(Strict):
    """One tier: a model, the engine that serves it, and the requests that it is for."""

    name: TierName
    """The name that clients use as ``model``; lower-case letters, digits, ``-`` and ``_``."""
    model: Annotated[str, Field(min_length=1)] = ""
    """A hub id, a local folder or file, or ``bundled:smollm2-135m``. For engine ``endpoint``: the model
    name to send to that address."""
    engine: EngineKind = "vllm"
    """What runs the model; ``endpoint`` is an OpenAI-compatible server that runs elsewhere."""
    profile: Scenario | None = None
    """A scenario template for a ``vllm`` tier: it provides the parallelism and the ``engine_args`` that the
    tier does not set itself; see ``controlplane/config/profiles.md``."""
    draft_model: Annotated[str, Field(min_length=1)] | None = None
    """A small model with the same vocabulary that proposes tokens, for a ``profile`` with speculative
    decoding; without it tokens are proposed from the prompt (n-gram lookup)."""
    served_model_name: ModelName | None = None
    """The model id that clients see and may request; by default the last part of ``model``. If two tiers with
    different models have the same id, requests for it are refused, and clients name the tier or the whole
    hub id."""
    engine_args: dict[str, ArgScalar | list[ArgScalar]] = Field(default_factory=dict)
    """The engine's own flags without the leading dashes: ``{max-model-len: 4096, enforce-eager: true}``.
    For engine ``simulated``: the settings of the timing model."""
    env: dict[VariableName, VariableValue] = Field(default_factory=dict)
    """Variables added to the environment of the engine process."""
    pass_env: list[EnvName] = Field(default_factory=list)
    """Names of variables that the engine process gets from the environment of its node. By default it gets
    only what programs, accelerators and model libraries use (such as ``PATH``, ``CUDA_*``, ``HF_*`` and
    ``VLLM_*``), so that model code can't read other secrets."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Where a ``vllm`` engine runs. Other engines reserve no GPU, except a ``simulated`` one that asks for
    it in ``engine_args`` (``gpus: 1``)."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share each layer of one ``vllm`` engine; it must divide the model's number of attention
    heads."""
    pipeline_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Pipeline stages (groups of GPUs) that the layers of one ``vllm`` engine are divided among."""
    pipeline_across_nodes: bool = False
    """Allow the stages of a pipeline on several nodes if no single node has room for all of them. vLLM's own
    Ray executor then chooses the GPUs, and the model must be available under the same name on each node. All
    tiers then use the GPUs that Ray assigns instead of leasing specific ones, so a GPU that is out of use may
    be assigned."""
    gpu_models: list[str] = Field(default_factory=list)
    """GPU models that replicas may run on, as `tierplane fit --gpus` names them; by default any."""
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of one GPU that a replica takes; below 1 only without parallelism."""
    cpus: NonNegative = 0.0
    """CPUs that Ray reserves for a replica."""
    replicas: Annotated[int, Field(ge=0)] = 1
    """Engines of this tier, each with the model in memory."""
    rollout_surge: Annotated[int, Field(ge=0)] = 0
    """When the configuration changes: how many new engines (at most ``replicas``) may start before as many
    old ones stop. The change waits until there is room (GPUs, memory) for them. With 0 an old engine stops
    first, and the tier's other replicas or its neighbours serve meanwhile."""
    concurrency_limit: Annotated[int, Field(ge=1)] = 10
    """Requests in flight per replica at which the replica counts as full."""
    complexities: list[Annotated[Complexity, Field(strict=False)]] | None = None
    """Complexities that this tier serves; by default ``lightweight``, ``balanced`` and ``capable`` serve
    simple, moderate and complex."""
    agent_types: list[Name] = Field(default_factory=list)
    """Values of ``agent_type`` that this tier serves."""
    spill: Literal["up", "down", "both", "none"] = "up"
    """Where requests for this tier go when it is full. Up by default: under load a response may cost
    more, but it is never silently worse."""
    bridge: Literal["up", "down", "both", "none"] | None = None
    """Where requests for this tier go while none of its endpoints is up, for example during a restart; by
    default both ways, or nowhere if ``spill`` is none."""
    expected: ExpectedLoad | None = None
    """The load that `tierplane size` chooses GPUs, parallelism, weight format and replicas for."""
    min_tier: Name | None = None
    """The lowest tier that may serve requests for this tier."""
    url: ServerUrl | None = None
    """Engine ``endpoint`` only: the server's address, without ``/v1``, a query or a key."""
    api_key_env: EnvName | None = None
    """Engine ``endpoint`` only: the environment variable that holds the server's API key."""
    trust_remote_code: bool = False
    """Run code from the model's repository. Enable it only for a repository that you trust."""
    startup_timeout_s: Positive = 1800.0
    """An engine that is not ready after this long is stopped, and the start counts as failed."""
    drain_timeout_s: NonNegative = 60.0
    """How long a stopping replica waits for its running requests."""
    health_interval_s: Positive = 2.0
    """How often a running engine is probed."""
    health_timeout_s: Positive = 5.0
    """A probe that gets no response within this time counts as failed."""
    health_failures: Annotated[int, Field(ge=1)] = 5
    """Failed probes in a row before a running engine counts as hung and is replaced."""
    restart: RestartConfig = RestartConfig()
    """How a lost engine is restarted."""
    slo: SloConfig = SloConfig()
    """The service-level objective of the tier's requests."""
    scaling: ScalingConfig | None = None
    """Bounds within which the number of replicas may change. Without it the tier always has ``replicas``,
    and recommendations are still made. With it the tier starts with ``replicas``."""

    @model_validator(mode="before")
    @classmethod
    def _with_profile(cls, values: Any) -> Any:
        return apply_profile(values) if isinstance(values, Mapping) else values

    @property
    def configured_slo(self) -> SloConfig | None:
        """``slo`` if the configuration sets it; None if the defaults apply."""
        return self.slo if "slo" in self.model_fields_set else None

    @field_validator("engine_args")
    @classmethod
    def _flags(cls, value: dict[str, Any]) -> dict[str, Any]:
        return with_dashes(value)

    @field_validator("gpu_models")
    @classmethod
    def _known_gpus(cls, value: list[str]) -> list[str]:
        found = gpu_model_findings(value)
        if found:
            raise FindingsError(found)
        return [table_name(name) for name in value]

    def findings(self) -> list[ConfigFinding]:
        """Settings of this tier that contradict each other."""
        found = [
            *self._address_findings(),
            *self._model_findings(),
            *self._size_findings(),
            *self._profile_findings(),
        ]
        if self.engine == "vllm":
            found += vllm_flag_findings(self.engine_args) + vllm_value_findings(self.engine_args)
        return found

    def _address_findings(self) -> list[ConfigFinding]:
        if self.engine == "endpoint":
            found = [
                ConfigFinding(
                    (key,), "engine 'endpoint' starts no process that could use it", "remove it", ("engine",)
                )
                for key in ("engine_args", "env", "pass_env")
                if getattr(self, key)
            ]
            if not self.url:
                remedy = "set the server's address without /v1, such as http://127.0.0.1:11434"
                found.append(ConfigFinding(("url",), "engine 'endpoint' needs it", remedy, ("engine",)))
            return found
        remedy = f"remove it, or use engine 'endpoint' instead of '{self.engine}'"
        return [
            ConfigFinding((key,), "only engine 'endpoint' has this setting", remedy, ("engine",))
            for key in ("url", "api_key_env")
            if getattr(self, key)
        ]

    def _model_findings(self) -> list[ConfigFinding]:
        if not self.model and self.engine != "simulated":
            remedy = f"name a hub id, a local path or {BUNDLED_PREFIX}{BUNDLED_MODELS[0]}"
            return [ConfigFinding(("model",), "missing", remedy, ("engine",))]
        if (
            self.model.startswith(BUNDLED_PREFIX)
            and self.model.removeprefix(BUNDLED_PREFIX) not in BUNDLED_MODELS
        ):
            known = ", ".join(BUNDLED_PREFIX + name for name in BUNDLED_MODELS)
            return [ConfigFinding(("model",), f"there is no bundled model '{self.model}'", f"known: {known}")]
        return []

    def _size_findings(self) -> list[ConfigFinding]:
        found = []
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        if self.gpu_share < 1 and self.world_size > 1:
            remedy = f"set it to 1, or set {' and '.join(sizes)} to 1"
            message = "an engine with parallelism can't run on a share of a GPU"
            found.append(ConfigFinding(("gpu_share",), message, remedy, sizes))
        gpus = self.engine_args.get("gpus", 0) if self.engine == "simulated" else 0
        if not isinstance(gpus, (int, float)) or gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            remedy = "use a share of one GPU, such as 0.5, or a whole number"
            message = f"{gpus!r} is not a number of GPUs"
            found.append(ConfigFinding(("engine_args", "gpus"), message, remedy))
        if self.engine != "vllm":
            found += [
                ConfigFinding(
                    (size,),
                    f"engine '{self.engine}' does not support this parallelism",
                    "remove it",
                    ("engine",),
                )
                for size in sizes
                if getattr(self, size) > 1
            ]
        if self.scaling and not self.scaling.min_replicas <= self.replicas <= self.scaling.max_replicas:
            bounds = f"{self.scaling.min_replicas} to {self.scaling.max_replicas}"
            remedy = "start within the bounds, or change them"
            message = f"{self.replicas} is outside the bounds of 'scaling', {bounds}"
            found.append(ConfigFinding(("replicas",), message, remedy, ("scaling",)))
        return found + self._gpu_findings()

    def _gpu_findings(self) -> list[ConfigFinding]:
        found = []
        if self.pipeline_across_nodes and self.on_gpus and self.pipeline_parallel_size == 1:
            remedy = "set it to the number of stages, or remove pipeline_across_nodes"
            size = "pipeline_parallel_size"
            found.append(
                ConfigFinding((size,), "one stage can't be on several nodes", remedy, ("engine", "device"))
            )
        if not self.on_gpus:
            found += [
                ConfigFinding((key,), "this tier uses no GPU", "remove it", ("engine", "device"))
                for key in ("pipeline_across_nodes", "gpu_models")
                if getattr(self, key)
            ]
        return found

    def _profile_findings(self) -> list[ConfigFinding]:
        if self.profile and self.engine != "vllm":
            remedy = f"remove it: scenario templates don't apply to engine '{self.engine}'"
            return [ConfigFinding(("profile",), "only engine 'vllm' has profiles", remedy, ("engine",))]
        if self.draft_model and not (self.profile and PROFILES[self.profile].speculative):
            speculating = " or ".join(name for name, profile in PROFILES.items() if profile.speculative)
            remedy = f"use profile {speculating}, or engine_args.speculative-config"
            message = (
                f"profile '{self.profile}' has no speculative decoding" if self.profile else "needs a profile"
            )
            return [ConfigFinding(("draft_model",), message, remedy, ("profile",))]
        return []

    @property
    def ceiling(self) -> int:
        """The most replicas that automatic or manual scaling may give the tier."""
        return self.scaling.max_replicas if self.scaling else max(self.replicas, DEFAULT_MAX)

    @property
    def world_size(self) -> int:
        """Workers of one engine: tensor × pipeline parallel size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def on_gpus(self) -> bool:
        """Whether the tier's engines take GPUs; simulated engines may reserve some, too."""
        return self._simulated_gpus > 0 or (self.engine == "vllm" and self.device == "gpu")

    @property
    def engine_gpus(self) -> float:
        """GPUs that one replica runs on; a fraction for a share of a GPU."""
        if not self.on_gpus or self.engine == "simulated":
            return self._simulated_gpus
        return self.gpu_share if self.world_size == 1 else float(self.world_size)

    @property
    def gpus(self) -> float:
        """GPUs that Ray reserves for one replica's actor: 0 for an engine that may be on several nodes, which
        reserves its GPUs itself."""
        return 0.0 if self.pipeline_across_nodes else self.engine_gpus

    @property
    def shape(self) -> GangShape:
        """The GPUs of one replica, as the placement planner takes them."""
        share = ceil(round(min(self.engine_gpus, 1.0) * WHOLE_MILLI, 6))
        if not self.on_gpus:
            return GangShape(gpus=0, stages=self.pipeline_parallel_size)
        if self.engine == "simulated":
            return GangShape(
                gpus=max(1, round(self.gpus)), milli_gpu=share, models=frozenset(self.gpu_models)
            )
        return GangShape(
            gpus=self.tensor_parallel_size,
            stages=self.pipeline_parallel_size,
            milli_gpu=share,
            models=frozenset(self.gpu_models),
            across_nodes=self.pipeline_across_nodes,
        )

    @property
    def _simulated_gpus(self) -> float:
        gpus = self.engine_args.get("gpus", 0) if self.engine == "simulated" else 0
        return float(gpus) if isinstance(gpus, (int, float)) else 0.0

    @property
    def model_id(self) -> str:
        """The model id that clients see."""
        if self.served_model_name:
            return self.served_model_name
        if not self.model:
            return f"simulated-{self.name}"
        return self.model.removeprefix(BUNDLED_PREFIX).rstrip("/").rsplit("/", 1)[-1]

    @property
    def model_identity(self) -> str:
        """Equal for tiers that serve the same model, see :mod:`controlplane.config.model_identity`."""
        if not self.model:
            return self.model_id
        return model_identity(self.model, self.engine_args if self.engine in {"vllm", "llamacpp"} else {})

    @property
    def policy(self) -> TierPolicy:
        """What routing needs to know of the tier."""
        whole_name = bool(self.model) and self.served_model_name is None and not is_local(self.model)
        return TierPolicy(
            name=self.name,
            model_id=self.model_id,
            model_name=self.model if whole_name else "",
            identity=self.model_identity,
            label=model_label(self.model) or self.model_id,
            complexities=tuple(self.complexities) if self.complexities is not None else None,
            agent_types=tuple(self.agent_types),
            spill=OverflowDirection(self.spill),
            bridge=OverflowDirection(self.bridge) if self.bridge is not None else None,
            floor=self.min_tier,
        )


class QueueConfig(Strict):
    """The queue of a gateway replica, where requests wait while all tiers that may serve them are full."""

    capacity: Annotated[int, Field(ge=0)] = 1000
    """Requests that may wait; further requests are answered with 429."""
    timeout_s: Positive = 600.0
    """A request that has waited this long is answered with 408, even if its deadline is later."""
    age_after_s: Positive = 5.0
    """Requests that have waited longer than this get a share of the free slots (``aged_ratio``) regardless of
    their priority, so that low priority never starves."""
    aged_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the free slots for requests that have waited longer than ``age_after_s``."""
    reserved_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a tier's slots that is reserved for high priority, until no such request has come for 30 s."""


class RetryConfig(Strict):
    """Limits on retries after an engine fails a request."""

    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Attempts of one request that reach an engine, resumed streams included."""
    budget_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Retries per incoming request, on average, so that retries don't overload a failing fleet."""
    budget_min_per_s: NonNegative = 10.0
    """Retries per second that are always allowed."""


class GatewayConfig(Strict):
    """The REST interface."""

    host: ListeningHost = "127.0.0.1"
    """The address that the gateway's own port listens on; ``0.0.0.0`` to accept requests from other
    machines."""
    port: Port | Literal[0] = 8080
    """The gateway's own port, shared by the gateway replicas of a node; 0 switches it off."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Processes that relay requests."""
    cpus: NonNegative = 0.0
    """CPUs that Ray reserves for a gateway replica."""
    default_tier: Name | None = None
    """The tier of a request for ``auto`` that has no hint; by default ``balanced``, or else the first
    tier."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    """A longer request body is answered with 413; for a compressed one, its decoded size counts."""
    max_receiving_bytes: Annotated[int, Field(ge=1024)] = 128 * 1024 * 1024
    """Bytes of all requests that a gateway replica is receiving at one time, and of compressed bodies that it
    has decoded. Beyond it the largest unfinished requests are answered with 503. Large bodies of requests
    that are being handled may have four times as much."""
    allowed_hosts: list[HostName] = Field(default_factory=list)
    """Names in the ``Host`` header that are accepted, in any case and with any port. While ``host`` is a
    loopback address, other names that could be someone's in the public DNS are refused with 403, against DNS
    rebinding; IP addresses, names without a dot, ``*.localhost`` and ``*.internal`` need no entry. With
    another ``host``, every name is accepted unless there are entries."""
    cors_origins: list[Origin] = Field(default_factory=list)
    """Origins of web pages that may use the gateway from a browser, such as ``https://chat.example.com``;
    ``*`` for every page. Requests of other pages that do more than read are refused with 403."""
    request_timeout_s: Positive = 600.0
    """The deadline of a request that does not set one itself."""
    connect_timeout_s: Positive = 2.0
    """Time limit for connecting to an engine."""
    first_token_timeout_s: Positive = 120.0
    """A streamed response that has not started after this long is tried on another endpoint."""
    token_timeout_s: Positive = 60.0
    """A started stream that sends nothing for this long counts as lost."""
    silence_timeout_s: Positive = 10.0
    """An engine that has running requests but sends no byte on any of them for this long, and for several
    times its usual time to first token, counts as hung if another endpoint of the tier could take over."""
    resume: Literal["exact", "best_effort", "never"] = "best_effort"
    """What to do with a stream whose engine was lost: ``exact`` resumes it only if the text is sure to be
    the same as without the loss, ``best_effort`` also if the model was sampling without a seed."""
    hedge_after_s: Positive | None = None
    """Send the request to a second endpoint too if a stream has no first token after this long; off by
    default."""
    stream_comments_s: Annotated[float, Field(ge=0.1)] | None = None
    """While a stream waits in the queue or for its first token, send a comment this often, so that no load
    balancer closes the silent connection; off by default. A request's header ``x-stream-comments`` overrides
    it. The status is then sent with the first comment, so a later failure can only be an error event."""
    traces_endpoint: CollectorUrl | None = None
    """Where OpenTelemetry traces are sent, an OTLP/HTTP address such as ``http://127.0.0.1:4318/v1/traces``;
    off by default. An engine continues the traces with ``engine_args: {otlp-traces-endpoint: …}``."""
    traces_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced; if the client has started a trace, its sampling decision applies."""
    tls: TlsConfig | None = None
    """The certificate of the gateway's own port, which then speaks HTTPS only."""
    auth: AuthConfig = AuthConfig()
    """Who may use the gateway."""
    queue: QueueConfig = QueueConfig()
    """The queue for requests that find all tiers full."""
    retry: RetryConfig = RetryConfig()
    """Limits on retries."""


class ControllerConfig(Strict):
    """The controller actor."""

    namespace: Name = "tierplane"
    """The Ray namespace of the named actors; two planes on one cluster need different ones."""
    heartbeat_s: Positive = 2.0
    """How often replicas and gateways report; an endpoint is dropped after five missed reports."""
    tick_interval_s: Positive = 1.0
    """How often the controller evaluates the cluster's state and acts on it."""
    sample_interval_s: Positive = 1.0
    """How often each node's GPUs, CPUs, memory and disk are sampled."""
    engine_interval_s: Positive = 5.0
    """How often the controller reads each engine's own metrics."""
    store_path: StorePath = ""
    """The file for state that must survive a restart of the controller (leases, cordons, migrations, audit
    log, history); by default ``controller-NAMESPACE.sqlite`` in the run folder. With ``:memory:`` nothing is
    written."""
    overheat_after_s: Positive = 30.0
    """A GPU at its slowdown temperature for this long is taken out of use."""
    cordon_hold_s: Positive = 120.0
    """A GPU that was taken out of use returns after this long with good readings, and after twice as long
    each further time. After an XID that requires a reset it returns only once the reset has been observed."""
    hang_after_s: Positive = 120.0
    """An engine that has running requests but generates no token for this long is restarted."""
    crash_limit: Annotated[int, Field(ge=1)] = 3
    """When this many replicas of a tier have given up within half an hour, the tier is held: no replica of it
    is started for ten minutes, then for twenty, and so on."""
    scaling: ControllerScalingConfig = ControllerScalingConfig()
    """Targets and recommendations for the number of replicas."""
    alerts: AlertsConfig = AlertsConfig()
    """Alert rules, and where alerts are sent."""
    reports: ReportsConfig = ReportsConfig()
    """Samples for ``tierplane report``."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """``auto``: readable text on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Messages below this level are not logged."""


class PlaneConfig(Strict):
    """All of tierplane's settings: the ``args`` of the Serve application."""

    tiers: Annotated[list[TierConfig], Field(min_length=1)]
    """The tiers, from the cheapest to the most capable."""
    profile: Scenario | None = None
    """The scenario template of every ``vllm`` tier that does not set ``profile`` itself; ``profile: null``
    in a tier means no template."""
    gateway: GatewayConfig = GatewayConfig()
    """The REST interface."""
    controller: ControllerConfig = ControllerConfig()
    """The controller and logging."""
    engine_host: Literal["auto", "loopback", "node"] = "auto"
    """The address that engines listen on. ``loopback``: reachable from this machine only. ``node``: the
    node's address, for gateways on other nodes. ``auto``: loopback if ``tierplane up`` started Ray, else the
    node's address."""

    @model_validator(mode="before")
    @classmethod
    def _with_profiles(cls, values: Any) -> Any:
        return apply_plane_profile(values)

    def findings(self) -> list[ConfigFinding]:
        """Contradictions between tiers, or between a tier and the gateway."""
        found: list[ConfigFinding] = []
        first_by_name: dict[str, int] = {}
        owner_by_agent_type: dict[str, TierConfig] = {}
        for i, tier in enumerate(self.tiers):
            if first_by_name.setdefault(tier.name, i) != i:
                message = f"tiers[{first_by_name[tier.name]}] is named '{tier.name}' too"
                found.append(ConfigFinding(("tiers", i, "name"), message, "give each tier its own name"))
            for j, agent_type in enumerate(tier.agent_types):
                owner = owner_by_agent_type.setdefault(agent_type, tier)
                if owner is not tier:
                    message = f"agent type '{agent_type}' is already served by tier '{owner.name}'"
                    found.append(
                        ConfigFinding(("tiers", i, "agent_types", j), message, "list it in one tier only")
                    )
        for i, tier in enumerate(self.tiers):
            slots = tier.concurrency_limit * max(1, tier.replicas)
            if slots < self.gateway.replicas:
                message = f"{slots} slots can't be divided among {self.gateway.replicas} gateways"
                remedy = "each gateway needs at least one: raise this, or lower gateway.replicas"
                found.append(ConfigFinding(("tiers", i, "concurrency_limit"), message, remedy))
            if tier.min_tier and first_by_name.get(tier.min_tier, len(self.tiers)) > i:
                remedy = f"use one of: {', '.join(t.name for t in self.tiers[: i + 1])}"
                message = f"'{tier.min_tier}' is not '{tier.name}' or a tier before it"
                found.append(ConfigFinding(("tiers", i, "min_tier"), message, remedy))
        if self.gateway.max_receiving_bytes < self.gateway.max_body_bytes:
            message = f"{self.gateway.max_receiving_bytes} is less than one body may have"
            remedy = f"raise it to gateway.max_body_bytes ({self.gateway.max_body_bytes}) or more"
            found.append(ConfigFinding(("gateway", "max_receiving_bytes"), message, remedy))
        default = self.gateway.default_tier
        if default and default not in first_by_name:
            remedy = f"known: {', '.join(first_by_name)}"
            found.append(ConfigFinding(("gateway", "default_tier"), f"no tier is named '{default}'", remedy))
        if not found:
            try:
                self.route_table()
            except ValueError as error:
                found.append(ConfigFinding(("tiers",), str(error), "the gateway would not start"))
        return found

    def route_table(self) -> TierTable:
        """The tiers as the gateway routes to them. Raises ValueError as :meth:`TierTable.build` does."""
        return TierTable.build([tier.policy for tier in self.tiers], self.gateway.default_tier)

    def tier(self, name: str) -> TierConfig:
        """The tier of that name; KeyError if there is none."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise KeyError(name)
