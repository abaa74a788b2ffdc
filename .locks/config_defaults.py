"""Writes what a ``config.json`` may leave out, for each model type, from the installed transformers.

Run with ``make vllm-flags``. See controlplane/models/catalog.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from controlplane.core.sizing.hf_config import DEFAULTED_FIELDS

TABLE = Path(__file__).parents[1] / "controlplane" / "data" / "config_defaults.json"


def defaults_of(model_type: str) -> dict[str, Any] | None:
    """The fields' defaults; for a multimodal model only ``text``, the type of its language model."""
    kind = CONFIG_MAPPING[model_type]
    try:
        made = kind()
        text = made.get_text_config(decoder=True)
    except (
        OSError,
        ValueError,
        TypeError,
        ImportError,
        StrictDataclassError,
    ):  # no default without its parts or the hub
        return None
    if text is not made:
        return {"text": text.model_type}
    found = {name: getattr(kind, name, None) for name in DEFAULTED_FIELDS}
    values = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return values if {"hidden_size", "num_hidden_layers"} <= set(values) else None


if __name__ == "__main__":
    rows = {name: values for name in sorted(CONFIG_MAPPING) if (values := defaults_of(name))}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(values)}" for name, values in rows.items())
    TABLE.write_text(f'{{"transformers": "{transformers.__version__}", "types": {{\n{lines}\n}}}}\n')
    print(f"{len(rows)} model types of transformers {transformers.__version__}")
