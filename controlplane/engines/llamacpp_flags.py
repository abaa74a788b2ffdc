"""Checks a tier's ``engine_args`` for llama.cpp before an engine is started: names, kinds, sizes.

Names and kinds are checked with the installed package's own parameters and the code that sets them for an
engine. Without the package only sizes are checked.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from typing import Any, Final

from controlplane.config import TierConfig
from controlplane.config.problems import is_secret, shown_value
from controlplane.config.strict import ConfigFinding
from controlplane.engines.llamacpp import ALIASES, OWN_FIELDS
from controlplane.engines.llamacpp_server import UnusableSettings, apply

LEAST_CONTEXT_TOKENS: Final = 256
"""The least context of one slot: llama.cpp rounds up to multiples of it, and prompts need some of it."""

_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "cpuparams.n_threads": (-1, 512),
    "cpuparams_batch.n_threads": (-1, 512),
    "cache_ram_mib": (-1, math.inf),
    "n_batch": (1, math.inf),
    "n_cache_reuse": (0, math.inf),
    "n_ctx": (0, math.inf),
    "n_gpu_layers": (-2, math.inf),
    "n_parallel": (1, 256),
    "n_predict": (-2, math.inf),
    "n_threads_http": (-1, 4096),
    "n_ubatch": (1, math.inf),
    "sampling.min_p": (0, 1),
    "sampling.temp": (0, 100),
    "sampling.top_k": (0, math.inf),
    "sampling.top_p": (0, 1),
}
"""Field → the least and the largest value that makes sense."""


def llamacpp_findings(tier: TierConfig) -> list[ConfigFinding]:
    """A finding under ``engine_args`` for each flag that llama.cpp lacks or whose value can't be right."""
    found = []
    first: dict[str, str] = {}
    for flag, value in tier.engine_args.items():
        field = ALIASES.get(flag, flag.replace("-", "_"))
        if first.setdefault(field, flag) != flag:
            fault: tuple[str, str] | None = (f"'{first[field]}' sets the same", "remove one of the two")
        elif value is None:
            continue
        elif field in OWN_FIELDS:
            fault = ("this flag can't be set here", "remove it: tierplane sets it")
        else:
            fault = _fault(flag, field, value)
        if fault:
            found.append(ConfigFinding(("engine_args", flag), *fault))
    return found + _slot_findings(tier, first)


def _fault(flag: str, field: str, value: Any) -> tuple[str, str] | None:
    shown = "" if is_secret((flag,)) else f", not {shown_value(value)}"
    if field in _BOUNDS:
        least, most = _BOUNDS[field]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number{shown}", "write a number without quotes"
        if not least <= value <= most:
            bounds = f"at least {least:g}" if value < least or math.isnan(value) else f"at most {most:g}"
            return f"must be {bounds}{shown}", "correct it, or remove the flag"
    names = _names()
    if not names:
        return None
    if field not in names:
        close = difflib.get_close_matches(flag, [*ALIASES, *(name.replace("_", "-") for name in names)], n=1)
        remedy = (
            f"did you mean '{close[0]}'?" if close else "remove it; common ones are " + ", ".join(ALIASES)
        )
        return "llama.cpp has no such flag", remedy
    params = _params()
    kind = type(functools.reduce(getattr, field.split("."), params))
    if isinstance(value, bool) is not (kind is bool):
        return f"must be {_kind_text(kind)}{shown}", "correct it, or remove the flag"
    try:
        apply(params, {flag: value})
    except UnusableSettings:
        return f"must be {_kind_text(kind)}{shown}", "correct it, or remove the flag"
    return None


def _kind_text(kind: type) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return words.get(kind, f"a value of type {kind.__name__}")


def _slot_findings(tier: TierConfig, flag_of: Mapping[str, str]) -> list[ConfigFinding]:
    values = {field: tier.engine_args[flag] for field, flag in flag_of.items()}
    context, slots = values.get("n_ctx"), values.get("n_parallel") or min(tier.concurrency_limit, 4)
    if type(context) is not int or type(slots) is not int or context <= 0 or slots < 1:
        return []
    if values.get("kv_unified") is True or context // slots >= LEAST_CONTEXT_TOKENS:
        return []
    message = f"{context} tokens for {slots} slots are {context // slots} for each request"
    remedy = f"set it to {LEAST_CONTEXT_TOKENS * slots} at least, or lower parallel"
    return [ConfigFinding(("engine_args", flag_of["n_ctx"]), message, remedy)]


def _params() -> Any:
    """New parameters of the installed llama.cpp; None if it isn't installed or can't be imported."""
    try:
        from xllamacpp import CommonParams
    except ImportError:
        return None
    return CommonParams()


@functools.cache
def _names() -> frozenset[str]:
    """The fields that can be set, with those of parts as ``part.field``; empty without the package."""
    params = _params()
    if params is None:
        return frozenset()
    fields = {name for name in dir(params) if not name.startswith("_")}
    return frozenset(fields | {path for path in ALIASES.values() if "." in path})
