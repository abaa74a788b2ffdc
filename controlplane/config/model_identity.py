"""When two tiers serve the same model: the same hub id and revision, or the same file or folder, with the
same quantisation and adapters. Two names whose last parts are equal may be different models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

BUNDLED_PREFIX = "bundled:"

_CHANGE_THE_MODEL: Final = frozenset(
    {
        "code-revision", "control-vectors", "default-mm-loras", "hf-config-path", "hf-overrides",
        "lora-adapters", "lora-modules", "mmproj", "quantization", "quantization-config", "revision",
        "tokenizer", "tokenizer-revision",
    }
)  # fmt: skip
"""Engine flags with which the same files are another model."""


def is_local(model: str) -> bool:
    """Whether ``model`` is a file or a folder rather than a hub id."""
    return model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf") or os.path.isdir(model)


def model_identity(model: str, engine_args: Mapping[str, Any]) -> str:
    """A text that is equal for two tiers if, and only if, they serve the same model.

    ``engine_args`` are the flags of an engine that loads the model, with dashes; empty for other engines.
    """
    source = os.path.realpath(os.path.expanduser(model)) if is_local(model) else model
    changes = {
        flag: value
        for flag, value in sorted(engine_args.items())
        if flag in _CHANGE_THE_MODEL and value not in (None, False, "", [])
    }
    return " ".join([source, *(f"{flag}={_text(value)}" for flag, value in changes.items())])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def model_label(model: str) -> str:
    """A name of the model for clients and operators: the hub id, or the last two parts of a path."""
    if not is_local(model):
        return model
    return "/".join(os.path.normpath(model).split(os.sep)[-2:])
