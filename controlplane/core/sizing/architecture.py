"""A model's architecture as numbers: every matrix of a decoder, so that parameters are counted exactly.

A :class:`ModelSpec` covers decoders with MHA, GQA or MLA attention, dense or mixture-of-experts layers,
biases, query/key norms, tied embeddings and sliding windows. :mod:`controlplane.core.sizing.hf_config` makes
one from a ``config.json``. How a matrix is split over tensor-parallel ranks follows vLLM's parallel layers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from controlplane.core.sizing.quantization import NONE, Quantization

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this (``DEFAULT_VOCAB_PADDING_SIZE``)."""


class Split(StrEnum):
    """How tensor parallelism splits a matrix."""

    COLUMN = "column"
    """By outputs; the bias is split too."""
    ROW = "row"
    """By inputs; every rank holds the whole bias."""
    KV = "kv"
    """By KV heads; if there are fewer heads than ranks, the heads are replicated."""
    REPLICATED = "replicated"
    """Every rank holds the whole matrix."""
    VOCAB = "vocab"
    """By rows of the padded vocabulary."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix, or ``copies`` equal ones (experts)."""

    name: str
    inputs: int
    outputs: int
    split: Split
    copies: int = 1
    bias: bool = False
    quantizable: bool = True

    @property
    def params(self) -> int:
        """Parameters, bias included."""
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))


@dataclass(frozen=True, slots=True)
class Moe:
    """The experts of a mixture-of-experts layer."""

    experts: int
    experts_per_token: int
    intermediate: int
    """Hidden units of one expert."""
    shared_intermediate: int = 0
    """Hidden units of all shared experts together."""
    shared_gate: bool = False
    """Qwen2-MoE: one more row, which gates the shared expert."""
    router_bias: bool = False
    """DeepSeek-V3: a float32 correction bias per expert."""


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek)."""

    q_lora_rank: int
    """0 means that the query is projected in one step."""
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int

    @property
    def cache_dim(self) -> int:
        """Values cached per token and layer."""
        return self.kv_lora_rank + self.rope_head_dim


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What distinguishes decoder layers of one model from each other."""

    window: int = 0
    """Tokens of the sliding window; 0 means full attention."""
    moe: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only model as numbers."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    layers: tuple[LayerKind, ...]
    max_length: int
    """Tokens of the longest sequence that the model was made for."""
    tied: bool = False
    """Input embedding and output head are one matrix."""
    dtype: str = "bfloat16"
    """The checkpoint's dtype."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    gated_mlp: bool = True
    qk_norm: bool = False
    """Norms over ``head_dim`` for queries and keys (Qwen3, Gemma 3)."""
    norms_per_layer: int = 2
    norm_bias: bool = False
    rotary_ratio: float = 1.0
    moe: Moe | None = None
    mla: Mla | None = None
    quantization: Quantization = NONE
    kv_dtype: str = ""
    """The format of the KV cache that the checkpoint asks for; empty means the engine's dtype."""
    default_length: int = 0
    """Tokens of the longest sequence if no engine argument sets it; 0 means ``max_length``."""
    notes: tuple[str, ...] = ()
    """For the user: parts of the model that are not counted or were not read exactly."""
    guesses: tuple[str, ...] = ()
    """Those of the notes that may make the sizes far off: parts of the configuration that are not known."""

    @property
    def layer_counts(self) -> Counter[LayerKind]:
        """Number of layers of each kind."""
        return Counter(self.layers)

    @property
    def params(self) -> int:
        """Parameters of the whole model: a tied embedding counts once, and the vocabulary is not padded."""
        total = self.embedding(padded=False).params + self.final_norm_params
        if not self.tied:
            total += self.head(padded=False).params
        return total + sum(self.layer_params(kind) * n for kind, n in self.layer_counts.items())

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through: only the chosen experts, and no embedding lookup."""
        total = self.final_norm_params + self.head(padded=False).params
        for kind, n in self.layer_counts.items():
            total += n * (self.layer_params(kind) - (self._idle_expert_params() if kind.moe else 0))
        return total

    @property
    def final_norm_params(self) -> int:
        """The norm before the output head."""
        return self.hidden * (2 if self.norm_bias else 1)

    @property
    def padded_vocab(self) -> int:
        """Rows of the vocabulary as vLLM stores it."""
        return -(-self.vocab // VOCAB_PADDING) * VOCAB_PADDING

    def embedding(self, padded: bool = True) -> Matrix:
        """The input embedding."""
        rows = self.padded_vocab if padded else self.vocab
        return Matrix("embed_tokens", self.hidden, rows, Split.VOCAB, quantizable=False)

    def head(self, padded: bool = True) -> Matrix:
        """The output head; the same matrix as the embedding if ``tied``."""
        rows = self.padded_vocab if padded else self.vocab
        bias = self.head_bias
        return Matrix(
            "lm_head", self.hidden, rows, Split.VOCAB, bias=bias, quantizable=self.quantization.lm_head
        )

    def layer_params(self, kind: LayerKind) -> int:
        """Parameters of one layer of that kind."""
        matrices = sum(matrix.params for matrix in self.matrices(kind))
        return matrices + self.layer_norm_params + self.router_bias_params(kind)

    @property
    def layer_norm_params(self) -> int:
        """All norm weights of one layer, which every rank holds."""
        total = self.norms_per_layer * self.hidden * (2 if self.norm_bias else 1)
        if self.qk_norm:
            total += 2 * self.head_dim
        if self.mla:
            total += self.mla.q_lora_rank + self.mla.kv_lora_rank
        return total

    def router_bias_params(self, kind: LayerKind) -> int:
        """Parameters of DeepSeek-V3's per-expert correction in one layer of that kind."""
        return self.moe.experts if kind.moe and self.moe and self.moe.router_bias else 0

    def matrices(self, kind: LayerKind) -> tuple[Matrix, ...]:
        """The matrices of one layer of that kind."""
        attention = self._mla_matrices(self.mla) if self.mla else self._gqa_matrices()
        if kind.moe and self.moe:
            return attention + self._moe_matrices(self.moe)
        return attention + self._mlp_matrices("mlp", self.intermediate)

    def _gqa_matrices(self) -> tuple[Matrix, ...]:
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return (
            Matrix("q_proj", self.hidden, q, Split.COLUMN, bias=self.qkv_bias),
            Matrix("k_proj", self.hidden, kv, Split.KV, bias=self.qkv_bias),
            Matrix("v_proj", self.hidden, kv, Split.KV, bias=self.qkv_bias),
            Matrix("o_proj", q, self.hidden, Split.ROW, bias=self.o_bias),
        )

    def _mla_matrices(self, mla: Mla) -> tuple[Matrix, ...]:
        q = self.heads * (mla.nope_head_dim + mla.rope_head_dim)
        kv_b = self.heads * (mla.nope_head_dim + mla.v_head_dim)
        query: tuple[Matrix, ...]
        if mla.q_lora_rank:
            query = (
                Matrix("q_a_proj", self.hidden, mla.q_lora_rank, Split.REPLICATED),
                Matrix("q_b_proj", mla.q_lora_rank, q, Split.COLUMN),
            )
        else:
            query = (Matrix("q_proj", self.hidden, q, Split.COLUMN),)
        return (
            *query,
            Matrix("kv_a_proj_with_mqa", self.hidden, mla.cache_dim, Split.REPLICATED),
            Matrix("kv_b_proj", mla.kv_lora_rank, kv_b, Split.COLUMN),
            Matrix("o_proj", self.heads * mla.v_head_dim, self.hidden, Split.ROW, bias=self.o_bias),
        )

    def _mlp_matrices(self, prefix: str, intermediate: int, copies: int = 1) -> tuple[Matrix, ...]:
        up = Matrix(
            f"{prefix}.up_proj", self.hidden, intermediate, Split.COLUMN, copies=copies, bias=self.mlp_bias
        )
        down = Matrix(
            f"{prefix}.down_proj", intermediate, self.hidden, Split.ROW, copies=copies, bias=self.mlp_bias
        )
        if not self.gated_mlp:
            return up, down
        gate = Matrix(
            f"{prefix}.gate_proj", self.hidden, intermediate, Split.COLUMN, copies=copies, bias=self.mlp_bias
        )
        return gate, up, down

    def _moe_matrices(self, moe: Moe) -> tuple[Matrix, ...]:
        router = Matrix("mlp.gate", self.hidden, moe.experts, Split.REPLICATED, quantizable=False)
        matrices = (router, *self._mlp_matrices("mlp.experts", moe.intermediate, copies=moe.experts))
        if moe.shared_intermediate:
            matrices += self._mlp_matrices("mlp.shared_experts", moe.shared_intermediate)
        if moe.shared_gate:
            gate = Matrix("mlp.shared_expert_gate", self.hidden, 1, Split.REPLICATED, quantizable=False)
            matrices += (gate,)
        return matrices

    def _idle_expert_params(self) -> int:
        if self.moe is None:
            return 0
        one = sum(matrix.params for matrix in self._mlp_matrices("mlp.experts", self.moe.intermediate))
        return one * (self.moe.experts - self.moe.experts_per_token)


def plain_model(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int = 0,
    vocab: int = 32000,
    params: float = 0,
    head_dim: int = 0,
) -> ModelSpec:
    """A Llama-like model from plain numbers, in bfloat16 and with 8192 tokens of context.

    Without ``intermediate`` the feed-forward width is chosen so that the model has ``params`` parameters.
    Raises ValueError if the numbers contradict each other.
    """
    if min(layers, hidden, heads, kv_heads, vocab) < 1:
        raise ValueError("layers, hidden, heads, kv_heads and vocab must be at least 1")
    head_dim = head_dim or hidden // heads

    def build(width: int) -> ModelSpec:
        return ModelSpec(
            name="plain numbers",
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=width,
            vocab=vocab,
            layers=(LayerKind(),) * layers,
            max_length=8192,
            notes=("a Llama-like model from plain numbers",),
        )

    if intermediate:
        return build(intermediate)
    if not params:
        raise ValueError("give params or intermediate: one of them sets the feed-forward width")
    rest = params - build(0).params
    width = round(rest / (3 * hidden * layers) / 64) * 64
    if width < 1:
        raise ValueError(
            f"{params:.3g} parameters are fewer than attention and embeddings alone "
            f"({build(0).params:.3g}): check layers, hidden and vocab"
        )
    return build(width)
