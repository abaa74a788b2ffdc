"""How long a sequence a model's configuration allows, as vLLM 0.32 reads it (``_get_and_verify_max_len``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

Config = Mapping[str, Any]

DEFAULT_LENGTH = 2048
"""What vLLM assumes if a configuration names no length."""

_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""Fields that may hold the length; the smallest counts."""
_ALREADY_SCALED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
"""RoPE types of which the configuration's length includes the factor."""


class ContextLength(NamedTuple):
    """Lengths in tokens."""

    longest: int
    """The largest ``max-model-len`` that vLLM accepts."""
    default: int
    """The length without ``max-model-len``."""


def context_length(config: Config, text: Config) -> ContextLength:
    """The lengths of a model; ``text`` is the part of ``config`` for the language model."""
    found = [int(value) for key in _KEYS if _positive(value := text.get(key))]
    length = float(min(found, default=DEFAULT_LENGTH))
    if _positive(text.get("model_max_length")):  # Cohere's, which holds even if another field is smaller
        length = float(text["model_max_length"])
    ropes = list(_ropes(text))
    if "gemma3" not in str(config.get("model_type", "")):  # its length is that after scaling
        factors = [rope.get("factor") for rope in ropes if _rope_type(rope) not in _ALREADY_SCALED]
        for factor in factors:
            length *= float(factor) if _positive(factor) else 1.0
            break
    default = length
    if any(_rope_type(rope) == "longrope" for rope in ropes):
        original = text.get("original_max_position_embeddings")
        default = float(original) if _positive(original) else length
    return ContextLength(int(length), int(default))


def _ropes(text: Config) -> Iterator[Config]:
    """The RoPE parameters: one set, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name)
        if not isinstance(found, Mapping):
            continue
        if _rope_type(found):
            yield found
        else:
            yield from (each for each in found.values() if isinstance(each, Mapping))
        return


def _rope_type(rope: Config) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "")


def _positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
