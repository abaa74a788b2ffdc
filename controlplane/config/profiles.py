"""Scenario templates: default settings of ``vllm`` tiers for five kinds of deployment.

``profile: production_low`` in a tier (or for all tiers at once) provides the settings that the tier does not
have itself. The tier's own settings win, flag by flag; for a flag that is set to null vLLM's default applies.
``profiles.md`` maps the flags that these templates were first written with to today's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

Scenario = Literal["development", "staging", "production_low", "production_high", "enterprise"]

SPECULATIVE_TOKENS: Final = 5
"""Tokens proposed for each step, by a draft model or by n-gram lookup."""
LOOKUP_TOKENS: Final = 4
"""The longest n-gram that is looked up in the prompt."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The template of one scenario."""

    name: Scenario
    gpu_memory_ratio: float
    """Share of each GPU's memory that the engine may take."""
    max_length_tokens: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_sequences: int
    max_batched_tokens: int
    quantization: str | None
    prefix_caching: bool
    chunked_prefill: bool
    speculative: bool
    structured_outputs: bool

    def engine_args(self, *, device: str = "gpu", draft_model: str | None = None) -> dict[str, Any]:
        """The template's vLLM flags, without leading dashes.

        On a CPU the memory share and the quantisation are left out: the share would be one of the whole
        machine's memory, which the tiers have in common, and the AWQ kernels are for GPUs.
        """
        args: dict[str, Any] = {
            "gpu-memory-utilization": self.gpu_memory_ratio,
            "max-model-len": self.max_length_tokens,
            "max-num-seqs": self.max_sequences,
            "max-num-batched-tokens": self.max_batched_tokens,
            "enable-prefix-caching": self.prefix_caching,
            "enable-chunked-prefill": self.chunked_prefill,
        }
        if self.quantization:
            args["quantization"] = self.quantization
        if device == "cpu":
            args = {k: v for k, v in args.items() if k not in {"gpu-memory-utilization", "quantization"}}
        if self.speculative:
            args["speculative-config"] = _json(_speculation(draft_model))
        if self.structured_outputs:
            # Without the second setting small models generate endless white space, which the grammar allows.
            args["structured-outputs-config"] = _json({"backend": "xgrammar", "disable_any_whitespace": True})
        return args


def _speculation(draft_model: str | None) -> dict[str, Any]:
    if draft_model:
        # The target's tensor parallel size may not divide the draft's heads; 1 always works.
        return {
            "model": draft_model,
            "num_speculative_tokens": SPECULATIVE_TOKENS,
            "draft_tensor_parallel_size": 1,
        }
    return {
        "method": "ngram",
        "num_speculative_tokens": SPECULATIVE_TOKENS,
        "prompt_lookup_max": LOOKUP_TOKENS,
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile(
            "development",  # one small GPU that is shared with others
            gpu_memory_ratio=0.6, max_length_tokens=2048, tensor_parallel_size=1, pipeline_parallel_size=1,
            max_sequences=32, max_batched_tokens=2048, quantization=None, prefix_caching=False,
            chunked_prefill=False, speculative=False, structured_outputs=False,
        ),
        Profile(
            "staging",  # like production, at a small scale
            gpu_memory_ratio=0.8, max_length_tokens=4096, tensor_parallel_size=1, pipeline_parallel_size=1,
            max_sequences=64, max_batched_tokens=4096, quantization="awq", prefix_caching=True,
            chunked_prefill=False, speculative=False, structured_outputs=False,
        ),
        Profile(
            "production_low",  # one GPU per engine
            gpu_memory_ratio=0.85, max_length_tokens=4096, tensor_parallel_size=1, pipeline_parallel_size=1,
            max_sequences=128, max_batched_tokens=8192, quantization="awq", prefix_caching=True,
            chunked_prefill=True, speculative=False, structured_outputs=False,
        ),
        Profile(
            "production_high",  # two GPUs per engine
            gpu_memory_ratio=0.9, max_length_tokens=8192, tensor_parallel_size=2, pipeline_parallel_size=1,
            max_sequences=256, max_batched_tokens=16384, quantization="awq", prefix_caching=True,
            chunked_prefill=True, speculative=True, structured_outputs=False,
        ),
        Profile(
            "enterprise",  # a whole node of eight GPUs per engine
            gpu_memory_ratio=0.95, max_length_tokens=16384, tensor_parallel_size=4, pipeline_parallel_size=2,
            max_sequences=512, max_batched_tokens=32768, quantization="awq", prefix_caching=True,
            chunked_prefill=True, speculative=True, structured_outputs=True,
        ),
    )
}  # fmt: skip
"""The scenarios, from the smallest to the largest."""

if tuple(PROFILES) != get_args(Scenario):
    raise AssertionError("PROFILES and Scenario name different scenarios")


def apply_profile(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tier's settings with those that its ``profile`` adds; unchanged if it has no profile.

    Invalid settings (an unknown profile, ``engine_args`` that are not a mapping) are left to validation.
    """
    profile = PROFILES.get(str(values.get("profile")))
    own_args = values.get("engine_args", {})
    if profile is None or values.get("engine", "vllm") != "vllm" or not isinstance(own_args, Mapping):
        return dict(values)
    draft_model = values.get("draft_model")
    defaults = profile.engine_args(
        device=str(values.get("device", "gpu")),
        draft_model=draft_model if isinstance(draft_model, str) else None,
    )
    own_flags = {str(flag).replace("_", "-").removeprefix("no-") for flag in own_args}
    added = {flag: value for flag, value in defaults.items() if flag not in own_flags}
    return {
        "tensor_parallel_size": profile.tensor_parallel_size,
        "pipeline_parallel_size": profile.pipeline_parallel_size,
        **values,
        "engine_args": {**added, **own_args},
    }


def apply_plane_profile(values: Any) -> Any:
    """A plane's settings with its ``profile`` copied to every ``vllm`` tier that does not set ``profile``."""
    if not isinstance(values, Mapping) or values.get("profile") not in PROFILES:
        return values
    tiers = values.get("tiers")
    if not isinstance(tiers, list):
        return values
    filled = [
        {"profile": values["profile"], **tier}
        if isinstance(tier, Mapping) and tier.get("engine", "vllm") == "vllm"
        else tier
        for tier in tiers
    ]
    return {**values, "tiers": filled}
