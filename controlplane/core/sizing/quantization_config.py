"""Reads a checkpoint's ``quantization_config``: the formats of its weights and of its KV cache."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from controlplane.core.sizing.quantization import NONE, Quantization, Scheme

Config = Mapping[str, Any]

NVFP4_GROUP: Final = 16
MICROSCALING_GROUP: Final = 32
"""Weights that share a scale in the OCP microscaling formats (mxfp4, mxfp8)."""


class CheckpointFormat(NamedTuple):
    """How a checkpoint is stored, as far as its configuration says."""

    weights: Quantization = NONE
    kv_dtype: str = ""
    """What vLLM stores in the KV cache with ``kv-cache-dtype auto``; empty means the engine's dtype."""
    notes: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    """Parts that can't be read: the sizes may be far off."""


def parse_quantization(raw: object) -> CheckpointFormat:
    """The formats that a ``quantization_config`` describes."""
    if not isinstance(raw, Mapping):
        return CheckpointFormat()
    inner = raw.get("quantization")
    fields: Config = {**raw, **inner} if isinstance(inner, Mapping) else raw
    method = str(fields.get("quant_method", "")).lower()
    skipped = _skipped(fields)
    single = [entry for entry in skipped if names_single_layer(entry)]
    notes = [f"{len(single)} exceptions from quantisation name single layers and are not counted"] * bool(
        single
    )
    weights, guess = _weights(method, fields)
    kv_dtype, kv_guess = _kv_dtype(method, fields)
    general = tuple(_pattern(entry) for entry in skipped if entry not in single)
    return CheckpointFormat(
        replace(weights, skipped=general) if weights.quantized else weights,
        kv_dtype,
        tuple(notes),
        tuple(text for text in (guess, kv_guess) if text),
    )


def _weights(method: str, fields: Config) -> tuple[Quantization, str]:
    """The format of the weights, and what about it is a guess."""
    group = max(_whole(fields.get("group_size") or fields.get("q_group_size")), 0)
    bits = _whole(fields.get("bits") or fields.get("w_bit")) or 4
    found: Quantization | None = None
    match method:
        case "awq" | "auto_awq":
            found = Quantization(Scheme.AWQ, bits=bits, group_size=group, zero_points=True)
        case "gptq" | "auto-round" | "gptqmodel":
            found = Quantization(
                Scheme.GPTQ,
                bits=bits,
                group_size=group,
                zero_points=True,
                activation_order=bool(fields.get("desc_act", False)),
                lm_head=bool(fields.get("lm_head", False)),
            )
        case "fp8" | "fbgemm_fp8":
            block = fields.get("weight_block_size")
            side = _whole(block[0]) if isinstance(block, list | tuple) and block else 0
            found = Quantization(Scheme.FP8, bits=8, group_size=side)
        case "mxfp4" | "gpt_oss_mxfp4":
            found = Quantization(Scheme.MXFP4, bits=4, group_size=MICROSCALING_GROUP)
        case "bitsandbytes":
            found = (
                Quantization(Scheme.INT8, bits=8)
                if fields.get("load_in_8bit")
                else Quantization(Scheme.BITSANDBYTES, bits=4, group_size=64)
            )
        case "compressed-tensors":
            return _groups(fields)
        case "modelopt" | "modelopt_fp4" | "modelopt_mixed":
            return _modelopt(method, fields)
    if found is None:
        return NONE, f"quantisation '{method}' is not known here: counted as not quantised"
    return found, ""


def _modelopt(method: str, fields: Config) -> tuple[Quantization, str]:
    """NVIDIA ModelOpt: one algorithm for all layers, or groups."""
    algorithm = str(fields.get("quant_algo") or ("NVFP4" if method == "modelopt_fp4" else "")).upper()
    group = _whole(fields.get("group_size"))
    if algorithm.startswith("FP8"):
        return Quantization(Scheme.FP8, bits=8), ""
    if algorithm in ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD"):
        return Quantization(Scheme.NVFP4, bits=4, group_size=group or NVFP4_GROUP), ""
    if algorithm == "MXFP8":
        return Quantization(Scheme.MXFP8, bits=8, group_size=MICROSCALING_GROUP), ""
    if isinstance(fields.get("config_groups"), Mapping):
        return _groups(fields)
    return NONE, f"quantisation 'modelopt {algorithm or '?'}' is not known here: counted as not quantised"


def _groups(fields: Config) -> tuple[Quantization, str]:
    """``config_groups``: for each group the modules that it names and the format of their weights."""
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return NONE, "the quantisation has no config_groups: counted as not quantised"
    found: list[tuple[tuple[str, ...], Quantization]] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            return NONE, f"the quantisation's group '{name}' can't be read: counted as not quantised"
        form = _group_format(group, str(group.get("format") or fields.get("format") or ""))
        if form is None:
            return NONE, f"the weights of the quantisation's group '{name}' are not known here"
        found.append(
            (tuple(_pattern(str(target)) for target in _list(group.get("targets")) or ["Linear"]), form)
        )
    formats = {form for _, form in found}
    if len(formats) == 1:
        return found[0][1], ""
    return Quantization(Scheme.MIXED, parts=tuple(found)), ""


def _group_format(group: Config, packing: str) -> Quantization | None:
    weights = group.get("weights")
    if weights is None:
        return NONE
    if not isinstance(weights, Mapping):
        return None
    bits = _whole(weights.get("num_bits")) or 8
    size = max(_whole(weights.get("group_size")), 0)
    if weights.get("type") == "float":
        if bits == 8 and size == MICROSCALING_GROUP:
            return Quantization(Scheme.MXFP8, bits=8, group_size=size)
        if bits == 8:
            block = _list(weights.get("block_structure"))
            side = _whole(block[0]) if block else size
            return Quantization(
                Scheme.FP8, bits=8, group_size=side if weights.get("strategy") == "block" else 0
            )
        if bits == 4 and (size == MICROSCALING_GROUP or "mxfp4" in packing):
            return Quantization(Scheme.MXFP4, bits=4, group_size=MICROSCALING_GROUP)
        if bits == 4:
            return Quantization(Scheme.NVFP4, bits=4, group_size=size or NVFP4_GROUP)
        return None
    if weights.get("type", "int") != "int":
        return None
    if bits == 8 and group.get("input_activations"):
        return Quantization(Scheme.INT8, bits=8)
    return Quantization(
        Scheme.GPTQ, bits=bits, group_size=size, zero_points=not weights.get("symmetric", True)
    )


def _kv_dtype(method: str, fields: Config) -> tuple[str, str]:
    """What ``kv-cache-dtype auto`` means, by vLLM 0.32: ``resolve_kv_cache_dtype_string`` for ModelOpt, and
    the ``kv_cache_scheme`` of compressed-tensors in its attention layer."""
    if not method.startswith(("modelopt", "compressed-tensors")):
        return "", ""
    scheme = fields.get("kv_cache_scheme") or fields.get("kv_cache_quant_algo")
    if not scheme:
        return "", ""
    if isinstance(scheme, Mapping):
        if scheme.get("type") == "float" and scheme.get("num_bits") == 8:
            return "fp8", ""
    elif str(scheme).lower() in ("fp8", "fp8_e4m3"):
        return "fp8", ""
    return "", "the checkpoint's format of the KV cache is not known here: the engine's dtype is counted"


def _skipped(fields: Config) -> tuple[str, ...]:
    for name in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers"):
        found = _list(fields.get(name))
        if found:
            return tuple(str(entry) for entry in found)
    return ()


def names_single_layer(module: str) -> bool:
    """Whether an entry of a list of modules is about layers by their number."""
    return re.search(r"layers(\\?\.)[\d(\[]", module) is not None


def _pattern(entry: str) -> str:
    """A module name as vLLM's lists write it, with ``*`` as a wildcard, as an entry of ``skipped``."""
    if entry.startswith("re:"):
        return entry
    if "*" in entry:
        return "re:" + fnmatch.translate(entry.rstrip("*")).removesuffix(r"\Z").removesuffix(r"\z")
    return entry


def _list(value: object) -> Sequence[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _whole(value: object) -> int:
    """A whole number, or 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
        return 0
    return int(value)
