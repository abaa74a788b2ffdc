"""Engine ``llamacpp``: llama.cpp's OpenAI server on GGUF files, from the package ``xllamacpp``.

For machines without a GPU: it needs no torch and starts in about a second. ``engine_args`` sets the fields of
llama.cpp's parameters; :data:`ALIASES` has the command line's names of the common ones.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import ClassVar

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import Capabilities
from controlplane.engines.base import Command, Diagnosis, Launch, MetricNames
from controlplane.engines.output import find, last_error, port_taken, tail

KEY_ENV = "TIERPLANE_LLAMACPP_KEY"

ALIASES = {
    "ctx-size": "n_ctx",
    "threads": "cpuparams.n_threads",
    "threads-batch": "cpuparams_batch.n_threads",
    "threads-http": "n_threads_http",
    "parallel": "n_parallel",
    "batch-size": "n_batch",
    "ubatch-size": "n_ubatch",
    "predict": "n_predict",
    "n-gpu-layers": "n_gpu_layers",
    "gpu-layers": "n_gpu_layers",
    "embeddings": "embedding",
    "jinja": "use_jinja",
    "context-shift": "ctx_shift",
    "cache-reuse": "n_cache_reuse",
    "cache-ram": "cache_ram_mib",
    "temp": "sampling.temp",
    "top-k": "sampling.top_k",
    "top-p": "sampling.top_p",
    "min-p": "sampling.min_p",
    "seed": "sampling.seed",
}
"""Flags of llama.cpp's command line → fields of its parameters. Other fields are set by their own names."""

OWN_FIELDS = frozenset({"api_keys", "hostnames", "port", "model_alias", "ssl_file_key", "ssl_file_cert"})
"""Fields that only tierplane sets; a tier may not."""

_PHASES = (
    (re.compile(r"loading model '"), "loading weights"),
    (re.compile(r"initializing, n_slots"), "creating slots"),
    (re.compile(r"warming up"), "warming up"),
    (re.compile(r"listening on http"), "ready"),
)
_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"tierplane: (?P<detail>.+)"), "{detail}"),
    (
        re.compile(r"No module named '?xllamacpp"),
        "the package xllamacpp is not installed: pip install 'tierplane[llamacpp]'",
    ),
    (
        re.compile(r"unknown model architecture: '(?P<detail>[^']+)'"),
        "this llama.cpp does not know the architecture '{detail}': use a newer xllamacpp or another model",
    ),
    (
        re.compile(r"invalid magic characters|gguf_init_from_file|not a GGUF|tensor .* data is not within"),
        "the model's file is not a valid GGUF file: download it again",
    ),
)
_OUT_OF_MEMORY = re.compile(
    r"failed to allocate|unable to allocate|ggml_aligned_malloc: insufficient memory|std::bad_alloc|"
    r"cannot meet free memory target|out of memory",
    re.IGNORECASE,
)


def slots(tier: TierConfig) -> tuple[int, int | None]:
    """(slots, tokens of prompt and response together that a request may have in one of them).

    llama.cpp divides ``ctx-size`` by the slots, unless they share it (``kv-unified``). The tokens are None if
    ``ctx-size`` is not set: then the model's own context length is what is divided.
    """
    args = tier.engine_args
    count = args.get("parallel", args.get("n-parallel")) or min(tier.concurrency_limit, 4)
    context = args.get("ctx-size", args.get("n-ctx"))
    if not isinstance(count, int) or not isinstance(context, int) or count < 1 or context < 1:
        return (count if isinstance(count, int) and count > 0 else 1), None
    return count, context if args.get("kv-unified") is True else context // count


class LlamaCppEngine:
    """llama.cpp's OpenAI server."""

    kind: ClassVar[str] = "llamacpp"
    has_process: ClassVar[bool] = True
    ready_path: ClassVar[str] = "/health"
    metrics_path: ClassVar[str] = "/metrics"
    metric_names: ClassVar[MetricNames] = MetricNames(
        running="llamacpp:requests_processing",
        waiting="llamacpp:requests_deferred",
        generation_tokens_total="llamacpp:tokens_predicted_total",
        prompt_tokens_total="llamacpp:prompt_tokens_total",
    )

    def command(self, tier: TierConfig, launch: Launch) -> Command:
        """The server's command line. Unless ``parallel`` is set, it has as many slots as the tier's
        ``concurrency_limit``, up to four; unless ``threads`` is set, one thread for each of
        ``launch.cores``."""
        args = dict(tier.engine_args)
        if launch.cores:
            args.setdefault("threads", launch.cores)
        if not {"parallel", "n-parallel"} & args.keys():
            args["parallel"] = min(tier.concurrency_limit, 4)
        return Command(
            argv=(
                sys.executable,
                "-m",
                "controlplane.engines.llamacpp_server",
                "--host",
                launch.host,
                "--port",
                str(launch.port),
                "--model",
                launch.model,
                "--alias",
                tier.model_id,
                "--params",
                json.dumps(args),
            ),
            # When llama.cpp aborts, it would start a debugger for a backtrace, if one is installed.
            env={"GGML_NO_BACKTRACE": "1", **tier.env, KEY_ENV: launch.secret},
            pass_env=tuple(tier.pass_env),
        )

    def capabilities(self, tier: TierConfig) -> Capabilities:
        """Chat, completions and messages; embeddings if ``engine_args`` turns them on; images and audio with
        a projector (``mmproj``); tools unless ``jinja`` is off. Its ``/v1/responses`` is not used: what its
        streams consist of lacks members that clients read."""
        args = tier.engine_args
        embeds = any(args.get(name) is True for name in ("embeddings", "embedding"))
        sees = any(str(name).startswith("mmproj") and value for name, value in args.items())
        tools = all(args.get(name) is not False for name in ("jinja", "use-jinja", "use_jinja"))
        return Capabilities(
            embeddings=embeds,
            messages=True,
            images=sees,
            audio=sees,
            video=False,
            tools=tools,
        )

    def phase(self, line: str) -> str | None:
        """The start-up phase that a log line of llama.cpp shows."""
        return next((phase for pattern, phase in _PHASES if pattern.search(line)), None)

    def diagnose(self, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
        """A known cause with its remedy, else lack of memory, else the last error line."""
        taken = port_taken(lines)
        if taken:
            return taken
        for pattern, summary in _CAUSES:
            match = find(pattern, lines)
            if match:
                text = summary.format(**match.groupdict())
                return Diagnosis(text, permanent=True, last_lines=tail(lines))
        if exit_code == -9 or find(_OUT_OF_MEMORY, lines):
            return Diagnosis(
                "memory ran out: lower ctx-size or parallel, or use a smaller model",
                last_lines=tail(lines),
            )
        return last_error("llama.cpp", lines, exit_code)
