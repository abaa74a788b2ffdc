"""The table of GPU models that ships with tierplane: ``controlplane/data/gpus.json``."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from importlib.resources import files

from controlplane.config.strict import ConfigFinding
from controlplane.core.sizing.gpu_models import GpuModel, find_gpu, parse_gpus


@functools.cache
def gpu_table() -> tuple[GpuModel, ...]:
    """Every GPU model of the table."""
    text = files("controlplane").joinpath("data", "gpus.json").read_text(encoding="utf-8")
    return parse_gpus(json.loads(text)["gpus"])


def gpu_model_findings(names: Sequence[str]) -> list[ConfigFinding]:
    """A finding for each of ``names`` that is not in the table; its path is the index in ``names``."""
    known = [gpu.name for gpu in gpu_table()]
    found = []
    for number, name in enumerate(names):
        if find_gpu(gpu_table(), name) is None:
            by_lower = {each.lower(): each for each in known}
            close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
            meant = f"did you mean '{by_lower[close[0]]}'? " if close else ""
            remedy = f"{meant}`tierplane fit --gpus` lists the names"
            found.append(ConfigFinding((number,), f"'{name}' is not in the table of GPU models", remedy))
    return found


@functools.lru_cache(maxsize=1024)
def table_name(name: str) -> str:
    """The table's name for a GPU model, alias or driver's name; ``name`` itself if the table lacks it."""
    known = find_gpu(gpu_table(), name)
    return known.name if known else name
