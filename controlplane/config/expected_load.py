"""What a tier is expected to carry: the question that ``tierplane size`` answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from controlplane.config.strict import ConfigFinding, FindingsError, Strict
from controlplane.core.sizing.quantization import PRESETS

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


class ExpectedLoad(Strict):
    """What a tier is to carry, for `tierplane size`; it changes nothing in a running plane."""

    requests_per_s: Positive
    """Requests a second, at the hour for which the fleet is sized."""
    input_tokens: Tokens
    """Mean length of a prompt."""
    output_tokens: Tokens
    """Mean length of an answer."""
    ttft_s: Positive = 2.0
    """Mean time to the first token that is wanted."""
    itl_s: Positive = 0.05
    """Mean time per token after it that is wanted."""
    quantizations: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["none"])
    """Weight formats that may be chosen, the preferred one first: `none` (the checkpoint as it is), `fp8`,
    `int8`, `awq`, `gptq`, …"""
    pipeline: bool = False
    """Pipeline parallelism may be chosen."""

    @field_validator("quantizations")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        remedy = f"there is {', '.join(PRESETS)}"
        found = [
            ConfigFinding((number,), f"'{name}' is no weight format", remedy)
            for number, name in enumerate(value)
            if name not in PRESETS
        ]
        if found:
            raise FindingsError(found)
        return value
