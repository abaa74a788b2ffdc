"""One plane of real vLLM engines for all that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.plane import Plane, running

TOOLS = {
    "enable-auto-tool-choice": True,
    "tool-call-parser": "hermes",
    "structured-outputs-config": '{"backend":"xgrammar","disable_any_whitespace":true}',
}


@pytest.fixture(scope="package")
def plane() -> Iterator[Plane]:
    """The three tiers of configs/cpu.yaml; the lightweight one calls tools too."""
    tiers: list[dict[str, Any]] = yaml.safe_load(Path("configs/cpu.yaml").read_text())["applications"][0][
        "args"
    ]["tiers"]
    tiers[0]["engine_args"].update(TOOLS)
    with running({"tiers": [{**tier, "drain_timeout_s": 2.0} for tier in tiers]}) as started:
        yield started
