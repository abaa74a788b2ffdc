"""The load that a tier is expected to carry: the input of ``tierplane size``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from controlplane.config.strict import ConfigFinding, FindingsError, Strict
from controlplane.core.sizing.quantization import PRESETS

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


class ExpectedLoad(Strict):
    """The load that a tier is expected to carry, for `tierplane size`; a running plane ignores it."""

    requests_per_s: Positive
    """Requests per second, at the hour that the fleet is sized for."""
    input_tokens: Tokens
    """Mean length of a prompt."""
    output_tokens: Tokens
    """Mean length of a response."""
    ttft_s: Positive = 2.0
    """Target for the mean time to first token."""
    itl_s: Positive = 0.05
    """Target for the mean time per token after the first."""
    quantizations: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["none"])
    """Weight formats that may be chosen, the preferred one first: `none` (the checkpoint as it is), `fp8`,
    `int8`, `awq`, `gptq`, …"""
    pipeline: bool = False
    """Whether pipeline parallelism may be chosen."""

    @field_validator("quantizations")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        remedy = f"known: {', '.join(PRESETS)}"
        found = [
            ConfigFinding((number,), f"'{name}' is not a weight format", remedy)
            for number, name in enumerate(value)
            if name not in PRESETS
        ]
        if found:
            raise FindingsError(found)
        return value
