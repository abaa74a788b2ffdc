"""How long a request to a tier may be."""

from __future__ import annotations

from controlplane.config import TierConfig
from controlplane.engines.llamacpp import slots
from controlplane.engines.simulated.engine import settings_of


def context_tokens(tier: TierConfig) -> int | None:
    """Tokens that one request to the tier may have, prompt and response together; None if the configuration
    does not say, and the model's own limit applies."""
    if tier.engine == "llamacpp":
        return slots(tier)[1]
    if tier.engine == "simulated":
        return settings_of(tier).max_model_len
    limit = tier.engine_args.get("max-model-len") if tier.engine == "vllm" else None
    return limit if type(limit) is int and limit > 0 else None
