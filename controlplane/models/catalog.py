"""The tables that ship with tierplane: GPU models and well-known public models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from controlplane.config.gpu_models import gpu_table
from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.gpu_models import GpuModel, find_gpu
from controlplane.core.sizing.hf_config import parse_config
from controlplane.errors import SetupError

__all__ = ["BUNDLED_NAMES", "gpu_named", "gpu_table", "known_model", "known_models"]

BUNDLED_NAMES: Mapping[str, str] = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name of a bundled model → its name in the table of known models."""


def gpu_named(name: str) -> GpuModel:
    """The GPU with that name, alias or driver name. SetupError with the known names if there is none."""
    gpu = find_gpu(gpu_table(), name)
    if gpu is None:
        known = ", ".join(entry.name for entry in gpu_table())
        raise SetupError(f"no GPU model '{name}' in the table; there is {known}")
    return gpu


@cache
def config_defaults() -> Mapping[str, Mapping[str, Any]]:
    """What a ``config.json`` may leave out, for each model type; ``make vllm-flags`` writes the table."""
    text = (files("controlplane") / "data" / "config_defaults.json").read_text(encoding="utf-8")
    found: Mapping[str, Mapping[str, Any]] = json.loads(text)["types"]
    return found


@cache
def known_models() -> tuple[Mapping[str, Any], ...]:
    """Every entry of ``controlplane/data/models.json``: name, config fields, published total."""
    text = (files("controlplane") / "data" / "models.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["models"])


def known_model(name: str) -> ModelSpec | None:
    """The well-known model of that name, or None. Case and the part before ``/`` don't matter."""
    wanted = name.lower()
    for entry in known_models():
        full = str(entry["name"]).lower()
        if wanted in {full, full.rsplit("/", 1)[-1]}:
            return parse_config(entry["config"], str(entry["name"]), config_defaults())
    return None
