"""Reads a ``config.json`` (Hugging Face) as a :class:`ModelSpec`.

The families in :data:`FAMILIES` are exact; the tests compare each with the parameter count of the model class
in ``transformers``. Others are read as if they were Llama-like, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controlplane.core.sizing.architecture import LayerKind, Mla, ModelSpec, Moe
from controlplane.core.sizing.quantization import NONE, Quantization, Scheme, dtype_name

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Properties that a ``model_type`` implies and its config doesn't state."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    norm_bias: bool = False
    gated_mlp: bool = True
    sliding_every_other: bool = False
    """Gemma 2: every even layer has a sliding window."""
    sliding_pattern: int = 0
    """Gemma 3: every n-th layer has full attention, all others a sliding window."""
    sliding_opt_in: bool = False
    """Qwen: ``sliding_window`` applies only with ``use_sliding_window``."""
    rotary_ratio: float = 1.0


FAMILIES: dict[str, ModelFamily] = {
    "llama": ModelFamily(),
    "mistral": ModelFamily(),
    "ministral": ModelFamily(),
    "mixtral": ModelFamily(),
    "phi3": ModelFamily(),
    "granite": ModelFamily(),
    "smollm3": ModelFamily(tied=True),
    "qwen2": ModelFamily(qkv_bias=True, sliding_opt_in=True),
    "qwen2_moe": ModelFamily(qkv_bias=True, sliding_opt_in=True),
    "qwen3": ModelFamily(qk_norm=True, sliding_opt_in=True),
    "qwen3_moe": ModelFamily(qk_norm=True, sliding_opt_in=True),
    "gemma": ModelFamily(tied=True),
    "gemma2": ModelFamily(tied=True, norms_per_layer=4, sliding_every_other=True),
    "gemma3_text": ModelFamily(tied=True, norms_per_layer=4, qk_norm=True, sliding_pattern=6),
    "phi": ModelFamily(
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        norms_per_layer=1,
        norm_bias=True,
        gated_mlp=False,
        rotary_ratio=0.5,
    ),
    "starcoder2": ModelFamily(
        qkv_bias=True, o_bias=True, mlp_bias=True, tied=True, norm_bias=True, gated_mlp=False
    ),
    "deepseek_v2": ModelFamily(),
    "deepseek_v3": ModelFamily(),
}
"""By ``model_type``."""

_SHARED_BIAS = frozenset(
    {"llama", "granite", "smollm3", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"}
)
"""Families in which ``attention_bias`` applies to all four attention matrices."""


def parse_config(config: Config, name: str) -> ModelSpec:
    """The model that ``config`` describes; ``name`` is only for reports.

    Raises ValueError that names the field if a required one is missing or has no usable value.
    """
    notes: list[str] = []
    guesses: list[str] = []
    text = config
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and "hidden_size" in nested:
        text = {**nested, **{k: v for k, v in config.items() if k == "quantization_config"}}
        if "dtype" not in text and "torch_dtype" not in text:
            text["dtype"] = config.get("dtype") or config.get("torch_dtype")
        notes.append("only the language model is counted, not the vision or audio part")
    model_type = str(text.get("model_type", ""))
    family = FAMILIES.get(model_type)
    if family is None:
        family = ModelFamily()
        guesses.append(f"model type '{model_type or 'unknown'}' is read as if it were Llama-like")
    layers = _number(text, "num_hidden_layers")
    hidden = _number(text, "hidden_size")
    heads = _number(text, "num_attention_heads")
    attention_bias = bool(text.get("attention_bias", False))
    shared_bias = attention_bias and model_type in _SHARED_BIAS
    mla = _mla(text)
    moe = _moe(text, model_type)
    quantization, quantization_note = parse_quantization(text.get("quantization_config"))
    if quantization_note:
        unknown = text.get("quantization_config") and not quantization.quantized
        (guesses if unknown else notes).append(quantization_note)
    return ModelSpec(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        intermediate=_intermediate(text, hidden),
        vocab=_number(text, "vocab_size"),
        layers=_layers(text, layers, family, moe, model_type),
        max_length=int(text.get("max_position_embeddings") or 2048),
        tied=bool(text.get("tie_word_embeddings", family.tied)),
        dtype=_dtype(text),
        qkv_bias=family.qkv_bias or shared_bias,
        o_bias=family.o_bias or shared_bias,
        mlp_bias=family.mlp_bias or bool(text.get("mlp_bias", False)),
        head_bias=family.head_bias,
        gated_mlp=family.gated_mlp,
        qk_norm=family.qk_norm,
        norms_per_layer=family.norms_per_layer,
        norm_bias=family.norm_bias,
        rotary_ratio=float(text.get("partial_rotary_factor") or family.rotary_ratio),
        moe=moe,
        mla=mla,
        quantization=quantization,
        notes=(*notes, *guesses),
        guesses=tuple(guesses),
    )


def parse_quantization(raw: object) -> tuple[Quantization, str]:
    """The format that a ``quantization_config`` describes, and a note if it can't be read exactly."""
    if not isinstance(raw, Mapping):
        return NONE, ""
    method = str(raw.get("quant_method", "")).lower()
    skipped = tuple(str(item) for item in _list(raw.get("modules_to_not_convert") or raw.get("ignore")))
    group = int(raw.get("group_size") or raw.get("q_group_size") or 0)
    bits = int(raw.get("bits") or raw.get("w_bit") or 4)
    note = _skipped_note(skipped)
    general = tuple(item for item in skipped if _is_general(item))
    found: Quantization | None = None
    match method:
        case "awq" | "auto_awq":
            found = Quantization(Scheme.AWQ, bits=bits, group_size=max(group, 0), zero_points=True)
        case "gptq" | "auto-round" | "gptqmodel":
            found = Quantization(
                Scheme.GPTQ,
                bits=bits,
                group_size=max(group, 0),
                zero_points=True,
                activation_order=bool(raw.get("desc_act", False)),
                lm_head=bool(raw.get("lm_head", False)),
            )
        case "fp8" | "fbgemm_fp8" | "modelopt":
            block = _list(raw.get("weight_block_size"))
            found = Quantization(Scheme.FP8, bits=8, group_size=int(block[0]) if block else 0)
        case "bitsandbytes":
            if raw.get("load_in_8bit"):
                found = Quantization(Scheme.INT8, bits=8)
            else:
                found = Quantization(Scheme.BITSANDBYTES, bits=4, group_size=64)
        case "compressed-tensors":
            found = _compressed(raw)
    if found is None:
        return NONE, f"quantisation '{method}' is not known here: counted as not quantised"
    return replace(found, skipped=general), note


def _compressed(raw: Config) -> Quantization | None:
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return None
    weights = next(iter(groups.values())).get("weights") or {}
    bits = int(weights.get("num_bits") or 8)
    group = int(weights.get("group_size") or 0)
    if weights.get("type") == "float" and bits == 8:
        return Quantization(Scheme.FP8, bits=8, group_size=group if weights.get("strategy") == "block" else 0)
    activations = next(iter(groups.values())).get("input_activations")
    if bits == 8 and activations:
        return Quantization(Scheme.INT8, bits=8)
    if weights.get("type", "int") != "int":
        return None
    return Quantization(
        Scheme.GPTQ, bits=bits, group_size=max(group, 0), zero_points=not weights.get("symmetric", True)
    )


def _is_general(module: str) -> bool:
    """Whether an entry of the list of unquantised modules names a kind of module, not single layers."""
    return "layers." not in module and not module.startswith("re:")


def _skipped_note(skipped: Sequence[str]) -> str:
    single = [item for item in skipped if not _is_general(item)]
    if not single:
        return ""
    return f"{len(single)} exceptions from quantisation name single layers and are not counted"


def _intermediate(config: Config, hidden: int) -> int:
    value = config.get("intermediate_size") or config.get("ffn_dim")
    return int(value) if value else 4 * hidden


def _dtype(config: Config) -> str:
    raw = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    try:
        return dtype_name(str(raw))
    except KeyError:
        return "bfloat16"


def _mla(config: Config) -> Mla | None:
    if not config.get("kv_lora_rank"):
        return None
    return Mla(
        q_lora_rank=int(config.get("q_lora_rank") or 0),
        kv_lora_rank=_number(config, "kv_lora_rank"),
        nope_head_dim=_number(config, "qk_nope_head_dim"),
        rope_head_dim=_number(config, "qk_rope_head_dim"),
        v_head_dim=_number(config, "v_head_dim"),
    )


def _moe(config: Config, model_type: str) -> Moe | None:
    experts = int(
        config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0
    )
    if experts < 2:
        return None
    intermediate = int(config.get("moe_intermediate_size") or _number(config, "intermediate_size"))
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    if config.get("n_shared_experts"):
        shared = int(config["n_shared_experts"]) * intermediate
    return Moe(
        experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 2),
        intermediate=intermediate,
        shared_intermediate=shared,
        shared_gate=model_type == "qwen2_moe" and shared > 0,
        router_bias=model_type == "deepseek_v3",
    )


def _layers(
    config: Config, count: int, family: ModelFamily, moe: Moe | None, model_type: str
) -> tuple[LayerKind, ...]:
    windows = _windows(config, count, family)
    first_dense = int(config.get("first_k_dense_replace") or 0)
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    dense = {int(layer) for layer in _list(config.get("mlp_only_layers"))}
    deepseek = model_type.startswith("deepseek")

    def sparse(layer: int) -> bool:
        if moe is None or layer in dense or layer < first_dense:
            return False
        return (layer % step == 0) if deepseek else ((layer + 1) % step == 0)

    return tuple(LayerKind(window=windows[layer], moe=sparse(layer)) for layer in range(count))


def _windows(config: Config, count: int, family: ModelFamily) -> list[int]:
    window = int(config.get("sliding_window") or 0)
    if family.sliding_opt_in and not config.get("use_sliding_window"):
        window = 0
    if not window:
        return [0] * count
    types = _list(config.get("layer_types"))
    if len(types) == count:
        return [window if kind == "sliding_attention" else 0 for kind in types]
    if family.sliding_every_other:
        return [0 if layer % 2 else window for layer in range(count)]
    pattern = int(config.get("sliding_window_pattern") or family.sliding_pattern)
    if pattern > 1:
        return [window if (layer + 1) % pattern else 0 for layer in range(count)]
    if family.sliding_opt_in:
        start = int(config.get("max_window_layers") or 0)
        return [window if layer >= start else 0 for layer in range(count)]
    return [window] * count


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _number(config: Config, field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has no usable '{field}' (found {value!r})")
    return value
