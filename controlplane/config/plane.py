"""tierplane's own settings, the ``args`` of its Serve application: :class:`PlaneConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from controlplane.config.alerts import AlertsConfig
from controlplane.config.expected_load import ExpectedLoad
from controlplane.config.gpu_models import gpu_model_findings, table_name
from controlplane.config.profiles import PROFILES, Scenario, fill_tier, spread
from controlplane.config.reports import ReportsConfig
from controlplane.config.scaling import DEFAULT_MAX, ControllerScalingConfig, ScalingConfig, SloConfig
from controlplane.config.strict import ConfigFinding, FindingsError, Strict
from controlplane.config.vllm_flags import vllm_flag_findings
from controlplane.core.domain.request import Complexity
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape

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
    "model": "use the tier's 'model'",
    "host": "remove it: tierplane sets it",
    "port": "remove it: tierplane sets it",
    "api-key": "remove it: tierplane makes a secret for each engine process",
    "served-model-name": "use the tier's 'served_model_name'",
    "tensor-parallel-size": "use the tier's 'tensor_parallel_size'",
    "pipeline-parallel-size": "use the tier's 'pipeline_parallel_size'",
    "trust-remote-code": "use the tier's 'trust_remote_code'",
}


class RestartConfig(Strict):
    """How a lost engine process is brought back."""

    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts inside ``window_s`` before the replica gives up and reports a diagnosis."""
    window_s: Positive = 600.0
    """How far back restarts are counted."""
    backoff_initial_s: NonNegative = 0.5
    """The wait before the first restart in the window."""
    backoff_max_s: Positive = 30.0
    """The wait doubles from ``backoff_initial_s`` at each restart in the window, up to this."""


class TierConfig(Strict):
    """One tier: a model, the engine that serves it, and what it is for."""

    name: Name
    """What clients call it, in ``model``; lower-case letters, digits, ``-`` and ``_``."""
    model: Annotated[str, Field(min_length=1)] = ""
    """A hub id, a local folder or file, or ``bundled:smollm2-135m``. For engine ``endpoint``: the model
    name to send there."""
    engine: EngineKind = "vllm"
    """What runs the model; ``endpoint`` is an OpenAI-compatible address that runs elsewhere."""
    profile: Scenario | None = None
    """A scenario template for a ``vllm`` tier: fills in parallelism and ``engine_args`` that the tier does
    not set itself; see ``controlplane/config/profiles.md``."""
    draft_model: Annotated[str, Field(min_length=1)] | None = None
    """A small model of the same vocabulary that guesses ahead, for a ``profile`` with speculative decoding;
    without it guesses come from the prompt (n-gram lookup)."""
    served_model_name: str | None = None
    """The model id clients see and may ask for; by default the last part of ``model``."""
    engine_args: dict[str, ArgScalar | list[ArgScalar]] = Field(default_factory=dict)
    """The engine's own flags without the leading dashes: ``{max-model-len: 4096, enforce-eager: true}``.
    For engine ``simulated``: the timing model's settings."""
    env: dict[str, str] = Field(default_factory=dict)
    """Added to the engine process's environment."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Where a ``vllm`` engine runs. The other engines reserve no GPU, but for a simulated one that says so
    in its ``engine_args`` (``gpus: 1``)."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share each layer of one ``vllm`` engine; its number of attention heads must divide by it."""
    pipeline_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Groups of GPUs that share the layers of one ``vllm`` engine."""
    pipeline_across_nodes: bool = False
    """Where no node has room for all stages of a pipeline, its stages may be on several nodes. vLLM's own Ray
    executor then chooses the GPUs, the model must be found under its name on each node, and all tiers use the
    GPUs that Ray names instead of leasing exact ones, so that a GPU out of use may be named."""
    gpu_models: list[str] = Field(default_factory=list)
    """GPU models that will do, as `tierplane fit --gpus` names them; by default any. Ray then puts replicas
    on no others."""
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of one GPU that a replica takes; under 1 only with no parallelism."""
    cpus: NonNegative = 0.0
    """CPUs that Ray reserves for a replica."""
    replicas: Annotated[int, Field(ge=0)] = 1
    """Engines of this tier, each with the model in memory."""
    rollout_surge: Annotated[int, Field(ge=0)] = 0
    """Engines, at most ``replicas``, that a changed configuration may start before it stops as many of the
    old ones; there must be room for them (GPUs, memory), or the change waits. 0: an old one stops first, and
    the tier's other replicas or its neighbours serve meanwhile."""
    concurrency_limit: Annotated[int, Field(ge=1)] = 10
    """Requests in flight per replica before the tier counts as full."""
    complexities: list[Annotated[Complexity, Field(strict=False)]] | None = None
    """What this tier serves; by default ``lightweight``, ``balanced`` and ``capable`` serve simple,
    moderate and complex."""
    agent_types: list[Name] = Field(default_factory=list)
    """Values of ``agent_type`` that this tier serves."""
    spill: Literal["up", "down", "both", "none"] = "up"
    """Where requests for this tier go when it is full. Up by default: under load an answer may cost
    more, but it is never silently worse."""
    bridge: Literal["up", "down", "both", "none"] | None = None
    """Where they go while no endpoint of the tier is up, for example during a restart; by default both
    ways, or nowhere if ``spill`` is none."""
    expected: ExpectedLoad | None = None
    """What the tier is to carry; `tierplane size` chooses GPUs, parallelism, weight format and replicas."""
    min_tier: Name | None = None
    """Requests for this tier never go to a tier before that one."""
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
    """How often a running engine is probed."""
    health_timeout_s: Positive = 5.0
    """When a probe counts as failed."""
    health_failures: Annotated[int, Field(ge=1)] = 5
    """Failed probes in a row before a running engine counts as hung and is replaced."""
    restart: RestartConfig = RestartConfig()
    """How a lost engine is brought back."""
    slo: SloConfig = SloConfig()
    """What its requests are promised."""
    scaling: ScalingConfig | None = None
    """How far it may grow and shrink; without it the tier keeps ``replicas``, and recommendations are given
    all the same. With it ``replicas`` is where it begins."""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        return fill_tier(values) if isinstance(values, Mapping) else values

    @property
    def given_slo(self) -> SloConfig | None:
        """Its ``slo`` where somebody wrote one; None: the default's."""
        return self.slo if "slo" in self.model_fields_set else None

    @field_validator("engine_args")
    @classmethod
    def _flags(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = []
        for flag in value:
            normal = flag.replace("_", "-")
            if normal in _SET_BY_TIERPLANE:
                remedy = _SET_BY_TIERPLANE[normal]
                found.append(ConfigFinding((flag,), "this flag is not set here", remedy))
            elif not _FLAG.match(normal):
                found.append(
                    ConfigFinding((flag,), f"'{flag}' is no flag name", "write it without leading dashes")
                )
        if found:
            raise FindingsError(found)
        return {flag.replace("_", "-"): item for flag, item in value.items()}

    @field_validator("gpu_models")
    @classmethod
    def _known_gpus(cls, value: list[str]) -> list[str]:
        found = gpu_model_findings(value)
        if found:
            raise FindingsError(found)
        return [table_name(name) for name in value]

    def findings(self) -> list[ConfigFinding]:
        """What doesn't fit together in this tier."""
        found = [
            *self._address_findings(),
            *self._model_findings(),
            *self._size_findings(),
            *self._profile_findings(),
        ]
        if self.engine == "vllm":
            found += vllm_flag_findings(self.engine_args)
        return found

    def _address_findings(self) -> list[ConfigFinding]:
        if self.engine == "endpoint":
            if not self.url:
                remedy = "name the address in front of /v1, such as http://127.0.0.1:11434"
                return [ConfigFinding(("url",), "engine 'endpoint' needs it", remedy, ("engine",))]
            if not re.match(r"^https?://[^/\s]+(/\S*)?$", self.url):
                return [
                    ConfigFinding(("url",), f"'{self.url}' is no address", "it looks like http://host:port")
                ]
            return []
        remedy = f"remove it, or use engine 'endpoint' instead of '{self.engine}'"
        return [
            ConfigFinding((key,), "only engine 'endpoint' has this", remedy, ("engine",))
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
            return [
                ConfigFinding(("model",), f"there is no bundled model '{self.model}'", f"there is {known}")
            ]
        return []

    def _size_findings(self) -> list[ConfigFinding]:
        found = []
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        if self.gpu_share < 1 and self.world_size > 1:
            remedy = f"leave it at 1, or set {' and '.join(sizes)} to 1"
            found.append(ConfigFinding(("gpu_share",), "a share of a GPU can't be parallel", remedy, sizes))
        asked = self.engine_args.get("gpus", 0) if self.engine == "simulated" else 0
        if not isinstance(asked, (int, float)) or asked < 0 or (asked > 1 and asked != int(asked)):
            remedy = "name a share of one, such as 0.5, or a whole number"
            found.append(ConfigFinding(("engine_args", "gpus"), f"{asked!r} is no number of GPUs", remedy))
        if self.engine != "vllm":
            found += [
                ConfigFinding(
                    (size,), f"engine '{self.engine}' has no such parallelism", "remove it", ("engine",)
                )
                for size in sizes
                if getattr(self, size) > 1
            ]
        if self.scaling and not self.scaling.min_replicas <= self.replicas <= self.scaling.max_replicas:
            bounds = f"{self.scaling.min_replicas} to {self.scaling.max_replicas}"
            remedy = "begin inside the bounds, or change them"
            message = f"{self.replicas} is outside scaling's bounds, {bounds}"
            found.append(ConfigFinding(("replicas",), message, remedy, ("scaling",)))
        return found + self._gpu_findings()

    def _gpu_findings(self) -> list[ConfigFinding]:
        found = []
        if self.pipeline_across_nodes and self.on_gpus and self.pipeline_parallel_size == 1:
            remedy = "set it to the number of stages, or leave pipeline_across_nodes out"
            size = "pipeline_parallel_size"
            found.append(
                ConfigFinding((size,), "one stage can't be on several nodes", remedy, ("engine", "device"))
            )
        if not self.on_gpus:
            found += [
                ConfigFinding((key,), "this tier takes no GPU", "remove it", ("engine", "device"))
                for key in ("pipeline_across_nodes", "gpu_models")
                if getattr(self, key)
            ]
        return found

    def _profile_findings(self) -> list[ConfigFinding]:
        if self.profile and self.engine != "vllm":
            remedy = f"remove it: engine '{self.engine}' has flags of its own"
            return [ConfigFinding(("profile",), "only engine 'vllm' has scenarios", remedy, ("engine",))]
        if self.draft_model and not (self.profile and PROFILES[self.profile].speculative):
            speculating = " or ".join(name for name, profile in PROFILES.items() if profile.speculative)
            remedy = f"use profile {speculating}, or engine_args.speculative-config"
            message = f"profile '{self.profile}' does not guess ahead" if self.profile else "needs a profile"
            return [ConfigFinding(("draft_model",), message, remedy, ("profile",))]
        return []

    @property
    def ceiling(self) -> int:
        """Replicas that it may be given at most, by scaling or by hand."""
        return self.scaling.max_replicas if self.scaling else max(self.replicas, DEFAULT_MAX)

    @property
    def world_size(self) -> int:
        """Workers of one engine: tensor × pipeline parallel size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def on_gpus(self) -> bool:
        """Whether its engines compute on GPUs, or hold some as if they did."""
        return self._simulated_gpus > 0 or (self.engine == "vllm" and self.device == "gpu")

    @property
    def engine_gpus(self) -> float:
        """GPUs that one replica computes on, a share counted as such."""
        if not self.on_gpus or self.engine == "simulated":
            return self._simulated_gpus
        return self.gpu_share if self.world_size == 1 else float(self.world_size)

    @property
    def gpus(self) -> float:
        """GPUs that Ray reserves for one replica's own process. None for an engine that may be on several
        nodes: it reserves its GPUs itself."""
        return 0.0 if self.pipeline_across_nodes else self.engine_gpus

    @property
    def shape(self) -> GangShape:
        """The GPUs of one replica, as the placement asks for them."""
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
        asked = self.engine_args.get("gpus", 0) if self.engine == "simulated" else 0
        return float(asked) if isinstance(asked, (int, float)) else 0.0

    @property
    def model_id(self) -> str:
        """The model id that clients see."""
        if self.served_model_name:
            return self.served_model_name
        if not self.model:
            return f"simulated-{self.name}"
        return self.model.removeprefix(BUNDLED_PREFIX).rstrip("/").rsplit("/", 1)[-1]


class QueueConfig(Strict):
    """Where requests wait when all tiers that may serve them are full; one for each gateway replica."""

    capacity: Annotated[int, Field(ge=0)] = 1000
    """Requests that may wait; one more is answered with 429."""
    timeout_s: Positive = 600.0
    """A request that found no place after this long is answered with 408, also before its deadline."""
    age_after_s: Positive = 5.0
    """Who waited longer gets a share of the places whatever the priority, so that low never starves."""
    aged_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """That share."""
    reserved_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a tier's slots that only high priority may take, for as long as there is any (within 30 s of
    the last one)."""


class RetryConfig(Strict):
    """How much is tried again when an engine fails a request."""

    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Attempts of one request that reach an engine, resumes included."""
    budget_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Retries per request that comes in, on average: a failing fleet is not finished off by retries."""
    budget_min_per_s: NonNegative = 10.0
    """Retries a second that are allowed whatever the traffic."""


class GatewayConfig(Strict):
    """The REST interface."""

    host: str = "127.0.0.1"
    """The address the gateway's own port listens on; ``0.0.0.0`` to be reached from other machines."""
    port: Port | Literal[0] = 8080
    """The gateway's own port, shared by the gateway replicas of a node; 0 switches it off."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Processes that relay requests."""
    cpus: NonNegative = 0.0
    """CPUs that Ray reserves for a gateway replica."""
    default_tier: Name | None = None
    """Where ``auto`` goes without a hint; by default ``balanced``, or else the first tier."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    """A longer request is answered with 413."""
    request_timeout_s: Positive = 600.0
    """A request's deadline unless it brings its own."""
    connect_timeout_s: Positive = 2.0
    """How long a connection to an engine may take."""
    first_token_timeout_s: Positive = 120.0
    """A streamed answer that has not begun after this long is tried elsewhere."""
    token_timeout_s: Positive = 60.0
    """A stream that gives nothing for this long counts as lost."""
    silence_timeout_s: Positive = 10.0
    """An engine that owes answers and gives no byte on any request for this long, and for several times
    its usual time to first token, counts as hung if another endpoint of the tier could take over."""
    resume: Literal["exact", "best_effort", "never"] = "best_effort"
    """What to do with a stream whose engine was lost: ``exact`` goes on only where the text is what it
    would have been, ``best_effort`` also where the model was sampling without a seed."""
    hedge_after_s: Positive | None = None
    """Ask a second endpoint when a stream has no first token after this long; off by default."""
    traces_endpoint: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """Where OpenTelemetry traces go, an OTLP/HTTP address such as ``http://127.0.0.1:4318/v1/traces``; off by
    default. An engine continues them with ``engine_args: {otlp-traces-endpoint: …}``."""
    traces_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced; one whose client began a trace follows the client."""
    queue: QueueConfig = QueueConfig()
    """Waiting for a place."""
    retry: RetryConfig = RetryConfig()
    """Trying again."""


class ControllerConfig(Strict):
    """The controller actor."""

    namespace: Name = "tierplane"
    """The Ray namespace of the named actors; two planes on one cluster need two."""
    heartbeat_s: Positive = 2.0
    """How often replicas and gateways report; five missed reports and an endpoint is dropped."""
    tick_interval_s: Positive = 1.0
    """How often the controller looks at everything and decides."""
    sample_interval_s: Positive = 1.0
    """How often each node's GPUs, CPUs, memory and disk are sampled."""
    engine_interval_s: Positive = 5.0
    """How often the controller reads each engine's own metrics."""
    store_path: str = ""
    """The file of what has to survive the controller (leases, cordons, moves, audit log, history); by
    default ``controller-NAMESPACE.sqlite`` in the run folder, ``:memory:``: nothing is written."""
    overheat_after_s: Positive = 30.0
    """A GPU at its slowdown temperature for this long is taken out of use."""
    cordon_hold_s: Positive = 120.0
    """A GPU that was taken out of use returns after good readings for this long, and after twice as long
    each next time; after an XID that needs a reset only once that is seen."""
    hang_after_s: Positive = 120.0
    """An engine that runs requests and makes no token for this long is restarted."""
    crash_limit: Annotated[int, Field(ge=1)] = 3
    """So many replicas of a tier that gave up within half an hour, and the tier is held: nothing of it is
    started for ten minutes, then twenty, and so on."""
    scaling: ControllerScalingConfig = ControllerScalingConfig()
    """What is done about load."""
    alerts: AlertsConfig = AlertsConfig()
    """What is told to whom when something is wrong."""
    reports: ReportsConfig = ReportsConfig()
    """What ``tierplane report`` looks back on."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """``auto``: readable on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is less important is not logged."""


class PlaneConfig(Strict):
    """All of tierplane's settings: the ``args`` of the Serve application."""

    tiers: Annotated[list[TierConfig], Field(min_length=1)]
    """From the cheapest to the most capable."""
    profile: Scenario | None = None
    """The scenario template of every ``vllm`` tier that names none itself (a tier's ``profile: null`` is
    none)."""
    gateway: GatewayConfig = GatewayConfig()
    """The REST interface."""
    controller: ControllerConfig = ControllerConfig()
    """The controller and logging."""
    engine_host: Literal["auto", "loopback", "node"] = "auto"
    """Where engines listen. ``loopback``: this machine only. ``node``: the node's address, for gateways on
    other nodes. ``auto``: loopback if ``tierplane up`` started Ray, else the node's address."""

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, values: Any) -> Any:
        return spread(values)

    def findings(self) -> list[ConfigFinding]:
        """What doesn't fit together between the tiers."""
        found: list[ConfigFinding] = []
        first_by_name: dict[str, int] = {}
        owner_by_agent_type: dict[str, TierConfig] = {}
        for i, tier in enumerate(self.tiers):
            if first_by_name.setdefault(tier.name, i) != i:
                message = f"'{tier.name}' is the name of tiers[{first_by_name[tier.name]}] too"
                found.append(ConfigFinding(("tiers", i, "name"), message, "give each tier a name of its own"))
            for j, agent_type in enumerate(tier.agent_types):
                owner = owner_by_agent_type.setdefault(agent_type, tier)
                if owner is not tier:
                    message = f"agent type '{agent_type}' is served by tier '{owner.name}' already"
                    found.append(
                        ConfigFinding(("tiers", i, "agent_types", j), message, "name it in one tier only")
                    )
        for i, tier in enumerate(self.tiers):
            slots = tier.concurrency_limit * max(1, tier.replicas)
            if slots < self.gateway.replicas:
                message = f"{slots} requests at a time can't be shared by {self.gateway.replicas} gateways"
                remedy = "each gateway needs at least 1: raise it, or lower gateway.replicas"
                found.append(ConfigFinding(("tiers", i, "concurrency_limit"), message, remedy))
            if tier.min_tier and first_by_name.get(tier.min_tier, len(self.tiers)) > i:
                remedy = f"name it or a tier before it: {', '.join(t.name for t in self.tiers[: i + 1])}"
                message = f"'{tier.min_tier}' is not '{tier.name}' or a tier before it"
                found.append(ConfigFinding(("tiers", i, "min_tier"), message, remedy))
        default = self.gateway.default_tier
        if default and default not in first_by_name:
            remedy = f"there is {', '.join(first_by_name)}"
            found.append(ConfigFinding(("gateway", "default_tier"), f"no tier is named '{default}'", remedy))
        return found

    def tier(self, name: str) -> TierConfig:
        """The tier of that name; KeyError if there is none."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise KeyError(name)
