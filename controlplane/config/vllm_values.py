"""Values of vLLM's flags that can't be right: of another kind, not among the choices, outside the bounds,
given twice, or of a flag that would take the engine out of tierplane's hands.

What each flag takes is read from ``vllm_flags.json``, see :mod:`controlplane.config.vllm_flags`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from controlplane.config.problems import did_you_mean, is_secret, shown_value
from controlplane.config.strict import ConfigFinding
from controlplane.config.vllm_flags import flags_are_certain, vllm_flag_values

Spec = Mapping[str, Any]
_Fault = tuple[str, str]
"""Message and remedy."""

_REFUSED: Final = {
    "config": "write its flags here",
    "grpc": "remove it: requests are sent over HTTP",
    "headless": "remove it: an engine needs its API server",
    "ssl-ca-certs": "remove it: engines are reached over plain HTTP with a secret",
    "ssl-certfile": "remove it: engines are reached over plain HTTP with a secret",
    "ssl-keyfile": "remove it: engines are reached over plain HTTP with a secret",
    "uds": "remove it: engines listen on a port that tierplane chooses",
}
"""Flags with which tierplane can't start or reach the engine → the remedy."""

_MEANT: Final = {
    "dtype": {"fp16": "half", "f16": "half", "bf16": "bfloat16", "fp32": "float32", "f32": "float32"}
}
_LEAST: Final = {"kv-cache-memory-bytes": 1, "num-gpu-blocks-override": 1}
"""Bounds that vLLM's configuration classes do not state."""
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")
_FACTORS: Final = {letter: 1000 ** (n + 1) for n, letter in enumerate("kmgt")} | {
    letter: 1024 ** (n + 1) for n, letter in enumerate("KMGT")
}


def vllm_value_findings(engine_args: Mapping[str, Any]) -> list[ConfigFinding]:
    """A finding under ``engine_args`` for each flag (with dashes) whose value vLLM would refuse."""
    if not flags_are_certain():
        return []
    specs = vllm_flag_values()
    found = []
    first: dict[str, str] = {}
    for flag, value in engine_args.items():
        negated = flag not in specs and flag.startswith("no-") and flag[3:] in specs
        name = flag[3:] if negated else flag
        if name not in specs:
            continue  # an unknown flag is reported elsewhere
        name = specs[name].get("alias", name)
        if first.setdefault(name, flag) != flag:
            message = f"'{first[name]}' sets the same"
            fault: _Fault | None = (message, "remove one of the two")
        elif value is None:
            continue
        elif name in _REFUSED and value is not False:
            fault = ("this flag can't be set here", _REFUSED[name])
        elif negated:
            fault = None if value is True and specs[name]["kind"] == "switch" else _negated(name, value)
        else:
            fault = value_fault(name, value, specs[name])
        if fault:
            found.append(ConfigFinding(("engine_args", flag), *fault, ("engine",)))
    return found + _between(engine_args)


def _negated(name: str, value: Any) -> _Fault:
    return f"must be true, not {shown_value(value)}", f"write {name}: true or {name}: false"


def _between(args: Mapping[str, Any]) -> list[ConfigFinding]:
    tokens, sequences = args.get("max-num-batched-tokens"), args.get("max-num-seqs")
    if type(tokens) is int and type(sequences) is int and 0 < tokens < sequences:
        message = f"{tokens} tokens of a step can't hold the {sequences} sequences of max-num-seqs"
        remedy = "raise it to max-num-seqs at least, or lower max-num-seqs"
        return [ConfigFinding(("engine_args", "max-num-batched-tokens"), message, remedy, ("engine",))]
    return []


def value_fault(name: str, value: Any, spec: Spec) -> _Fault | None:
    """Message and remedy if ``value`` can't be right for the flag; None if it can."""
    kind = spec["kind"]
    if kind in {"switch", "on"}:
        if isinstance(value, bool):
            return None
        return _wants("true or false", name, value, "write true or false, without quotes")
    if isinstance(value, list):
        if not spec.get("many"):
            remedy = "write one JSON text in quotes" if kind in {"json", "any"} else "write one value"
            return _wants("one value", name, value, remedy)
        return next((fault for item in value if (fault := _one_fault(name, item, spec))), None)
    return _one_fault(name, value, spec)


def _one_fault(name: str, value: Any, spec: Spec) -> _Fault | None:
    if isinstance(value, bool):
        if value and spec.get("bare"):
            return None
        return f"needs a value, not {shown_value(value)}", "write the value, or remove the flag"
    if value is None or (spec.get("optional") and value in {"", "None"}):
        return None
    if "choices" in spec:
        return _choice_fault(name, str(value), spec)
    return _KINDS.get(spec["kind"], _no_fault)(name, value, spec)


def _no_fault(_: str, __: Any, ___: Spec) -> _Fault | None:
    return None


def _choice_fault(name: str, value: str, spec: Spec) -> _Fault | None:
    choices = spec["choices"]
    if value in choices or (spec["kind"] == "any" and value.lower().replace("-", "_") in choices):
        return None
    meant = _MEANT.get(name, {}).get(value.lower().removeprefix("torch."))
    remedy = f"did you mean '{meant}'?" if meant else did_you_mean(value, choices)
    return _wants("one of vLLM's choices", name, value, remedy)


def _number_fault(name: str, value: Any, spec: Spec) -> _Fault | None:
    try:
        number = float(value)
    except ValueError:
        return _wants("a number", name, value, "write a number")
    if not math.isfinite(number):
        return _wants("a finite number", name, value, "write a number")
    return _bound_fault(name, number, value, spec)


def _integer_fault(name: str, value: Any, spec: Spec) -> _Fault | None:
    text = str(value).strip()
    if spec["kind"] == "size":
        if text.lower() == "auto" and spec.get("ge") == -1:
            return None
        size = _SIZE.fullmatch(text)
        if size and not ("." in size[1] and size[2].isupper()):
            return _bound_fault(name, float(size[1]) * _FACTORS[size[2]], value, spec)
    if not re.fullmatch(r"[-+]?\d{1,30}", text):
        example = "write digits, or a number with k or K" if spec["kind"] == "size" else "write digits only"
        return _wants("a whole number", name, value, example)
    return _bound_fault(name, int(text), value, spec)


def _bound_fault(name: str, number: float, value: Any, spec: Spec) -> _Fault | None:
    least = spec.get("ge", _LEAST.get(name))
    if spec.get("le") == 1 and 1 < number <= 100:
        return f"must be at most 1, not {shown_value(value)}", f"did you mean {number / 100:g}?"
    if "gt" in spec and number <= spec["gt"]:
        return f"must be above {spec['gt']:g}, not {shown_value(value)}", "raise it, or remove the flag"
    if least is not None and number < least:
        return f"must be at least {least:g}, not {shown_value(value)}", "raise it, or remove the flag"
    if "le" in spec and number > spec["le"]:
        return f"must be at most {spec['le']:g}, not {shown_value(value)}", "lower it, or remove the flag"
    if "lt" in spec and number >= spec["lt"]:
        return f"must be below {spec['lt']:g}, not {shown_value(value)}", "lower it, or remove the flag"
    if name == "max-model-len" and number == 0:
        return "must be at least 1, not 0", "remove the flag for the model's own length"
    return None


def _json_fault(name: str, value: Any, _: Spec) -> _Fault | None:
    try:
        json.loads(str(value))
    except (ValueError, RecursionError):
        return _wants("JSON", name, value, "write a JSON text in single quotes")
    return None


def _text_fault(name: str, value: Any, _: Spec) -> _Fault | None:
    return _wants("text", name, value, "put it in quotes") if isinstance(value, float) else None


_KINDS: Final[Mapping[str, Callable[[str, Any, Spec], _Fault | None]]] = {
    "int": _integer_fault,
    "size": _integer_fault,
    "float": _number_fault,
    "json": _json_fault,
    "text": _text_fault,
}


def _wants(what: str, name: str, value: Any, remedy: str) -> _Fault:
    shown = "" if is_secret((name,)) else f", not {shown_value(value)}"
    return f"must be {what}{shown}", remedy
