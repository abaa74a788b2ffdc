"""Reads a ``config.json`` (Hugging Face) as a :class:`ModelSpec`.

The families in :data:`FAMILIES` are exact; the tests compare each with the parameter count of the model class
in ``transformers``. Others are read as if they were Llama-like, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controlplane.core.sizing.architecture import LayerKind, Mla, ModelSpec, Moe
from controlplane.core.sizing.context_length import context_length
from controlplane.core.sizing.quantization import dtype_name
from controlplane.core.sizing.quantization_config import parse_quantization

Config = Mapping[str, Any]
ConfigDefaults = Mapping[str, Mapping[str, Any]]


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

_SAME_DECODER = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Language models of multimodal types that have the layers of another family."""

_SHARED_BIAS = frozenset(
    {"llama", "granite", "smollm3", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"}
)
"""Families in which ``attention_bias`` applies to all four attention matrices."""


DEFAULTED_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "sliding_window",
    "sliding_window_pattern", "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias",
    "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "n_shared_experts", "decoder_sparse_step", "first_k_dense_replace",
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "partial_rotary_factor",
)  # fmt: skip
"""Fields of a config.json whose absence means the default of the class in ``transformers``."""

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_OTHER_PARTS = {
    "vision": ("vision_config", "vision_tower", "mm_vision_tower", "visual", "vit_config", "vision_model"),
    "audio": ("audio_config", "audio_tower", "speech_config", "audio_encoder_config"),
}


def parse_config(config: Config, name: str, defaults: ConfigDefaults | None = None) -> ModelSpec:
    """The model that ``config`` describes; ``name`` is only for reports.

    ``defaults`` has, for each ``model_type``, what a config may leave out: the values of
    :data:`DEFAULTED_FIELDS`, or for a multimodal type as ``text`` the type of its language model. Raises
    ValueError that names the field if a required one is missing or has no usable value.
    """
    notes: list[str] = []
    guesses: list[str] = []
    text = _text_config(config, defaults or {}, notes)
    model_type = str(text.get("model_type", ""))
    family = FAMILIES.get(_SAME_DECODER.get(model_type, model_type))
    if family is None:
        family = ModelFamily()
        guesses.append(f"model type '{model_type or 'unknown'}' is read as if it were Llama-like")
    fields = _Fields(text, guesses)
    layers = fields.required("num_hidden_layers")
    hidden = fields.required("hidden_size")
    heads = fields.required("num_attention_heads")
    attention_bias = bool(text.get("attention_bias", False))
    shared_bias = attention_bias and model_type in _SHARED_BIAS
    moe = _moe(fields, model_type)
    length = context_length(config, text)
    checkpoint = parse_quantization(text.get("quantization_config"))
    notes += checkpoint.notes
    guesses += checkpoint.guesses
    return ModelSpec(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.number("num_key_value_heads") or heads,
        head_dim=fields.number("head_dim") or hidden // heads,
        intermediate=fields.number("intermediate_size") or fields.number("ffn_dim") or 4 * hidden,
        vocab=fields.required("vocab_size"),
        layers=_layers(fields, layers, family, moe, model_type),
        max_length=length.longest,
        default_length=length.default,
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
        mla=_mla(fields),
        quantization=checkpoint.weights,
        kv_dtype=checkpoint.kv_dtype,
        notes=(*notes, *guesses),
        guesses=tuple(guesses),
    )


def _text_config(config: Config, defaults: ConfigDefaults, notes: list[str]) -> Config:
    """The fields of the language model, with those that the config leaves out."""
    text: dict[str, Any] = dict(config)
    outer = config.get("thinker_config")
    outer = outer if isinstance(outer, Mapping) else config
    nested = next((outer[part] for part in _TEXT_PARTS if isinstance(outer.get(part), Mapping)), None)
    own = defaults.get(str(config.get("model_type", "")), {})
    if nested is not None and ("hidden_size" not in config or "hidden_size" in nested):
        shared = ("quantization_config", "tie_word_embeddings")
        text = {**{key: config[key] for key in shared if key in config}, **nested}
        if "model_type" not in text and "text" in own:
            text["model_type"] = own["text"]
        if "dtype" not in text and "torch_dtype" not in text:
            text["dtype"] = config.get("dtype") or config.get("torch_dtype")
    elif "text" in own:
        text["model_type"] = own["text"]
    others = [
        part
        for part, names in _OTHER_PARTS.items()
        if any(outer.get(name) or config.get(name) for name in names)
    ]
    if others or nested is not None:
        what = " and ".join(others) or "vision or audio"
        notes.append(f"only the language model is counted, not the {what} part")
    known = defaults.get(str(text.get("model_type", "")), {})
    left_out = [name for name in DEFAULTED_FIELDS if name in known and name not in text]
    for name in left_out:
        text[name] = known[name]
    shown = [f"{name} {known[name]}" for name in _ESSENTIAL if name in left_out]
    if shown:
        notes.append(f"left out of the configuration, so as in transformers: {', '.join(shown)}")
    return text


_ESSENTIAL = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "intermediate_size", "max_position_embeddings",
)  # fmt: skip


class _Fields:
    """The numbers of a config. A list with a value for each layer counts as its largest, which is a guess."""

    def __init__(self, values: Config, guesses: list[str]) -> None:
        self.values = values
        self._guesses = guesses

    def number(self, field: str) -> int:
        """A whole number, or 0 if the field is missing or null. Raises ValueError that names the field."""
        value = self.values.get(field)
        if isinstance(value, list) and value and all(_is_whole(each) for each in value):
            if len(set(value)) > 1:
                guess = f"{field} differs between layers: the largest, {max(value)}, is counted for all"
                if guess not in self._guesses:
                    self._guesses.append(guess)
            return int(max(value))
        if value is None or value is False:
            return 0
        if not _is_whole(value) or value < 0:
            raise ValueError(f"config.json has no usable '{field}' (found {value!r})")
        return int(value)

    def required(self, field: str) -> int:
        """A number of at least 1. Raises ValueError that names the field."""
        found = self.number(field)
        if found < 1:
            raise ValueError(f"config.json has no usable '{field}' (found {self.values.get(field)!r})")
        return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)


def _dtype(config: Config) -> str:
    raw = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    try:
        return dtype_name(str(raw))
    except KeyError:
        return "bfloat16"


def _mla(fields: _Fields) -> Mla | None:
    if not fields.number("kv_lora_rank"):
        return None
    return Mla(
        q_lora_rank=fields.number("q_lora_rank"),
        kv_lora_rank=fields.required("kv_lora_rank"),
        nope_head_dim=fields.required("qk_nope_head_dim"),
        rope_head_dim=fields.required("qk_rope_head_dim"),
        v_head_dim=fields.required("v_head_dim"),
    )


def _moe(fields: _Fields, model_type: str) -> Moe | None:
    experts = next(
        (
            n
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (n := fields.number(name))
        ),
        0,
    )
    if experts < 2:
        return None
    intermediate = fields.number("moe_intermediate_size") or fields.required("intermediate_size")
    shared = fields.number("shared_expert_intermediate_size")
    if fields.number("n_shared_experts"):
        shared = fields.number("n_shared_experts") * intermediate
    return Moe(
        experts=experts,
        experts_per_token=fields.number("num_experts_per_tok") or 2,
        intermediate=intermediate,
        shared_intermediate=shared,
        shared_gate=model_type == "qwen2_moe" and shared > 0,
        router_bias=model_type == "deepseek_v3",
    )


def _layers(
    fields: _Fields, count: int, family: ModelFamily, moe: Moe | None, model_type: str
) -> tuple[LayerKind, ...]:
    windows = _windows(fields, count, family)
    first_dense = fields.number("first_k_dense_replace")
    step = fields.number("decoder_sparse_step") or fields.number("moe_layer_freq") or 1
    dense = {int(layer) for layer in _list(fields.values.get("mlp_only_layers"))}
    deepseek = model_type.startswith("deepseek")

    def sparse(layer: int) -> bool:
        if moe is None or layer in dense or layer < first_dense:
            return False
        return (layer % step == 0) if deepseek else ((layer + 1) % step == 0)

    return tuple(LayerKind(window=windows[layer], moe=sparse(layer)) for layer in range(count))


def _windows(fields: _Fields, count: int, family: ModelFamily) -> list[int]:
    window = fields.number("sliding_window")
    if family.sliding_opt_in and not fields.values.get("use_sliding_window"):
        window = 0
    if not window:
        return [0] * count
    types = _list(fields.values.get("layer_types"))
    if len(types) == count:
        return [window if kind == "sliding_attention" else 0 for kind in types]
    if family.sliding_every_other:
        return [0 if layer % 2 else window for layer in range(count)]
    pattern = fields.number("sliding_window_pattern") or family.sliding_pattern
    if pattern > 1:
        return [window if (layer + 1) % pattern else 0 for layer in range(count)]
    if family.sliding_opt_in:
        start = fields.number("max_window_layers")
        return [window if layer >= start else 0 for layer in range(count)]
    return [window] * count


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
