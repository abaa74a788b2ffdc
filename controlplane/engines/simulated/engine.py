"""Engine ``simulated``: a real HTTP server with a token timing model instead of a language model.

It serves to test and load-test everything above an engine. It can't be mistaken for a model: every response
has the header ``x-engine: simulated`` and ``"system_fingerprint": "simulated"``, its metric names begin with
``simulated:``, and its capabilities include ``simulated``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, ValidationError

from controlplane.config import Strict, TierConfig
from controlplane.core.domain.endpoint import Capabilities
from controlplane.engines.base import Command, Diagnosis, Launch, MetricNames
from controlplane.engines.output import last_error, port_taken
from controlplane.errors import ConfigError, Problem

KEY_ENV = "TIERPLANE_SIMULATED_KEY"
"""The environment variable with the secret that the server requires; without it, it requires none."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_PHASE = re.compile(r"^simulated: (?P<phase>[a-z ]+)$")


class SimulatedSettings(Strict):
    """The timing model and the faults: a tier's ``engine_args``. A test can also change them at run time."""

    ttft_ms: NonNegative = 0.0
    """Time to first token of an idle engine, without the prefill time."""
    itl_ms: NonNegative = 0.0
    """Time between two tokens of a stream when it runs alone; 0 sends as fast as the machine can."""
    batch_slowdown: NonNegative = 0.0
    """The factor k in: time between tokens = itl_ms × (1 + k × (running − 1))."""
    max_running: Annotated[int, Field(ge=1)] = 256
    """Requests that generate at the same time; the rest wait in the queue."""
    tokens: Annotated[int, Field(ge=1)] = 128
    """The natural length of a generation. ``max_tokens`` makes it shorter, ``ignore_eos`` and ``min_tokens``
    longer, as in vLLM."""
    prefill_tokens_per_s: NonNegative = 0.0
    """Prompt tokens processed per second. The time for the prompt is added to ``ttft_ms``; 0 means no
    time."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Each time is multiplied by a random number between 1 − jitter and 1 + jitter."""
    seed: int = 0
    """The random seed of the jitter and of the errors."""
    load_s: NonNegative = 0.0
    """How long the start takes."""
    kv_cache_tokens: Annotated[int, Field(ge=1)] = 262_144
    """Capacity of the KV cache, for the usage gauge only."""
    max_model_len: Annotated[int, Field(ge=1)] = 32_768
    embedding_dimensions: Annotated[int, Field(ge=1)] = 64
    gpus: NonNegative = 0.0
    """GPUs that Ray reserves for a replica and that the replica leases, although it computes nothing on them:
    a fraction below 1, or a whole number."""

    refuse: bool = False
    """The port is closed and open connections are reset."""
    hang: bool = False
    """Connections are accepted, but nothing is sent on any of them, not even the rest of running
    responses."""
    hang_after_tokens: Annotated[int, Field(ge=0)] | None = None
    """Each response stalls after this many tokens; its connection stays open."""
    cut_after_tokens: Annotated[int, Field(ge=0)] | None = None
    """After this many tokens of a response, its connection is closed without completing it."""
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of generating requests that fail with ``error_status``."""
    error_status: Annotated[int, Field(ge=400, le=599)] = 500
    health_fails: bool = False
    """``/health`` returns 503."""
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    """The process exits with this code: after loading if set at the start, otherwise at once."""
    exit_after_s: NonNegative | None = None
    """The process exits with code 1 this long after it was ready."""


FAULTS = frozenset(
    {
        "refuse",
        "hang",
        "hang_after_tokens",
        "cut_after_tokens",
        "error_rate",
        "error_status",
        "health_fails",
        "exit_code",
        "exit_after_s",
    }
)
"""The settings that make the engine misbehave."""


def settings_of(tier: TierConfig) -> SimulatedSettings:
    """The settings in ``tier.engine_args``; raises ConfigError, which names every invalid one."""
    try:
        return SimulatedSettings.model_validate(
            {flag.replace("-", "_"): value for flag, value in tier.engine_args.items()}
        )
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    path=f"tiers.{tier.name}.engine_args.{'.'.join(str(part) for part in item['loc'])}",
                    message=item["msg"],
                    remedy="the settings of engine 'simulated' are: "
                    + ", ".join(SimulatedSettings.model_fields),
                )
                for item in error.errors()
            ]
        ) from error


class SimulatedEngine:
    """The timing model as an engine."""

    kind: ClassVar[str] = "simulated"
    has_process: ClassVar[bool] = True
    ready_path: ClassVar[str] = "/health"
    metrics_path: ClassVar[str] = "/metrics"
    metric_names: ClassVar[MetricNames] = MetricNames(
        running="simulated:num_requests_running",
        waiting="simulated:num_requests_waiting",
        kv_usage_ratio="simulated:kv_cache_usage_perc",
        generation_tokens_total="simulated:generation_tokens_total",
        prompt_tokens_total="simulated:prompt_tokens_total",
        success_total="simulated:request_success_total",
    )

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """The server's command line; raises ConfigError for invalid settings."""
        settings = settings_of(tier)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(launch.gpu_ids)} if launch.gpu_ids else {}
        return Command(
            argv=(
                sys.executable,
                "-m",
                "controlplane.engines.simulated.server",
                "--host",
                launch.host,
                "--port",
                str(launch.port),
                "--model",
                tier.model_id,
                "--settings",
                settings.model_dump_json(exclude_defaults=True),
            ),
            env={**devices, **tier.env, KEY_ENV: launch.secret},
            pass_env=tuple(tier.pass_env),
        )

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """All capabilities except tensor parallelism; of inputs, text and tools only."""
        return Capabilities(
            resume_by_token_ids=True,
            embeddings=True,
            responses=True,
            messages=True,
            images=False,
            audio=False,
            video=False,
            simulated=True,
        )

    def phase(self, line: str) -> str | None:
        """The phase in a line that the server prints for this purpose."""
        match = _PHASE.match(line)
        return match["phase"] if match else None

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """Whether the port was taken, else the last error line."""
        return port_taken(lines) or last_error("the simulated engine", lines, exit_code)
