"""How weights are stored: bytes of one matrix in each format, and which GPUs run the format.

The layouts are those that vLLM's linear methods create (read in vLLM 0.32, ``model_executor/layers/
quantization``) and, for GGUF, the block layouts of ggml (``ggml-common.h``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes that an engine may compute in → bytes per value."""

DTYPE_ALIASES: dict[str, str] = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}

SCALE_BYTES = 4
"""Scales of fp8 and int8 weights are float32 (vLLM's ``ChannelQuantScaleParameter`` and friends)."""

BITSANDBYTES_BLOCK = 64
"""Weights that share one float32 absmax in bitsandbytes' 4-bit formats (its default ``blocksize``)."""


class Scheme(StrEnum):
    """A family of weight formats."""

    NONE = "none"
    FP8 = "fp8"
    """8-bit floats, a scale per tensor, per output channel, or per block of ``group_size`` squared."""
    INT8 = "int8"
    """8-bit integers for weights and activations (w8a8), a scale per output channel."""
    AWQ = "awq"
    GPTQ = "gptq"
    """Packed integers with group scales: GPTQ, AutoRound, and compressed-tensors' wNa16."""
    BITSANDBYTES = "bitsandbytes"
    NVFP4 = "nvfp4"
    """4-bit floats with an fp8 scale for each group of 16 weights, and a float32 scale per matrix."""
    MXFP4 = "mxfp4"
    """4-bit floats with an 8-bit exponent for each group of 32 weights."""
    MXFP8 = "mxfp8"
    """8-bit floats with an 8-bit exponent for each group of 32 weights."""
    GGUF = "gguf"
    MIXED = "mixed"
    """Several formats, each for some modules: ``Quantization.parts``."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """One weight format with its parameters. Embeddings, norms and routers are not quantised: they have the
    engine's dtype."""

    scheme: Scheme = Scheme.NONE
    bits: int = 16
    group_size: int = 0
    """Weights along the input that share a scale; 0 means one scale per output channel. For block-wise fp8,
    the side length of the square block."""
    zero_points: bool = False
    activation_order: bool = False
    """GPTQ's ``desc_act``: a 4-byte group index per input row."""
    gguf_type: str = ""
    lm_head: bool = False
    """Whether the output head is also quantised."""
    skipped: tuple[str, ...] = ()
    """Modules that are not quantised: parts of their names, or ``re:`` and a pattern for the start of the
    full name."""
    parts: tuple[tuple[tuple[str, ...], Quantization], ...] = ()
    """For MIXED: modules, as in ``skipped`` or ``Linear`` for all, and their format. The first match
    counts."""
    online: bool = False
    """Whether the engine quantises a full-precision checkpoint while loading it."""

    @property
    def quantized(self) -> bool:
        """Whether any matrix is stored in less than the engine's dtype."""
        return self.scheme is not Scheme.NONE

    @property
    def label(self) -> str:
        """A short name for reports, such as ``awq 4 bit g128``."""
        if not self.quantized:
            return "none"
        if self.scheme is Scheme.GGUF:
            return f"gguf {self.gguf_type}"
        if self.scheme is Scheme.MIXED:
            return f"mixed: {', '.join(part.label for _, part in self.parts)}"
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.scheme} {self.bits} bit{group}"


NONE = Quantization()
FP8 = Quantization(Scheme.FP8, bits=8, online=True)
FP8_BLOCK = Quantization(Scheme.FP8, bits=8, group_size=128)
INT8 = Quantization(Scheme.INT8, bits=8)
AWQ = Quantization(Scheme.AWQ, bits=4, group_size=128, zero_points=True)
GPTQ = Quantization(Scheme.GPTQ, bits=4, group_size=128, zero_points=True, activation_order=True)
GPTQ_INT8 = replace(GPTQ, bits=8)
BNB4 = Quantization(Scheme.BITSANDBYTES, bits=4, group_size=BITSANDBYTES_BLOCK, online=True)

PRESETS: dict[str, Quantization] = {
    "none": NONE,
    "fp8": FP8,
    "fp8-block": FP8_BLOCK,
    "int8": INT8,
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq-int8": GPTQ_INT8,
    "bitsandbytes": BNB4,
}
"""Formats by the name that a user gives; :func:`preset` also accepts ``gguf:TYPE``."""

GGUF_BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 36),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "F64": (1, 8),
}
"""ggml tensor type → (elements in a block, bytes of a block with its scales)."""

GGUF_MIXES: dict[str, str] = {
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
}
"""llama.cpp's name for a mix of types → the type of most of its matrices. A mix stores some matrices in a
larger type, so the estimate is up to 10 % too low; the header of a local file is exact."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The GPUs that run a format."""

    minimum: int
    """Lowest compute capability x 10 on which vLLM loads the format."""
    native: int
    """Lowest compute capability x 10 on which vLLM also computes in the format; below it, the format only
    saves memory."""
    source: str


HARDWARE: dict[Scheme, Hardware] = {
    Scheme.NONE: Hardware(0, 0, "every GPU"),
    Scheme.FP8: Hardware(75, 89, "vLLM 0.32 Fp8Config.get_min_capability; w8a8 fp8 from 8.9, Marlin below"),
    Scheme.INT8: Hardware(75, 75, "vLLM 0.32 CompressedTensorsW8A8Int8.get_min_capability"),
    Scheme.AWQ: Hardware(75, 75, "vLLM 0.32 auto_awq get_min_capability"),
    Scheme.GPTQ: Hardware(60, 75, "vLLM 0.32 auto_gptq get_min_capability; Marlin from 7.5"),
    Scheme.BITSANDBYTES: Hardware(70, 70, "vLLM's bitsandbytes plug-in, BitsAndBytesConfig"),
    Scheme.NVFP4: Hardware(
        75, 100, "vLLM 0.32 CompressedTensorsW4A4Fp4.get_min_capability; Marlin below 10.0"
    ),
    Scheme.MXFP4: Hardware(80, 100, "vLLM 0.32 Mxfp4Config.get_min_capability; Marlin below 10.0"),
    Scheme.MXFP8: Hardware(80, 100, "vLLM 0.32 ModelOptMxFp8Config.get_min_capability; Marlin below 10.0"),
    Scheme.MIXED: Hardware(0, 0, "each of its formats"),
    Scheme.GGUF: Hardware(60, 60, "vLLM's GGUF plug-in, GGUFConfig; llama.cpp runs everywhere"),
}

FP8_KV_MINIMUM = 80
"""Lowest compute capability x 10 for an fp8 KV cache (FlashInfer and Triton attention, vLLM 0.32)."""


def dtype_name(text: str) -> str:
    """``bf16`` or ``torch.bfloat16`` → ``bfloat16``. KeyError if no engine computes in that dtype."""
    name = text.removeprefix("torch.").lower()
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPE_BYTES:
        raise KeyError(text)
    return name


def preset(name: str) -> Quantization:
    """The format of that name: one of :data:`PRESETS`, or ``gguf:Q4_K_M``. KeyError if there is none."""
    lowered = name.lower()
    if lowered.startswith("gguf:"):
        gguf_type = lowered.removeprefix("gguf:").upper()
        base = GGUF_MIXES.get(gguf_type, gguf_type)
        if base not in GGUF_BLOCKS:
            raise KeyError(name)
        elements, size = GGUF_BLOCKS[base]
        return Quantization(Scheme.GGUF, bits=round(size * 8 / elements), gguf_type=gguf_type, lm_head=True)
    return PRESETS[lowered]


def gguf_bytes(elements: int, gguf_type: str) -> int:
    """Bytes of a ggml tensor of ``elements`` weights; KeyError for an unknown type."""
    per_block, size = GGUF_BLOCKS[GGUF_MIXES.get(gguf_type, gguf_type)]
    return -(-elements // per_block) * size


def matrix_bytes(quantization: Quantization, inputs: int, outputs: int, dtype_bytes: int) -> int:
    """Bytes of one ``outputs x inputs`` weight matrix on one GPU, with its scales and zero points.

    ``dtype_bytes`` is the size of the engine's dtype, in which the scales of AWQ and GPTQ are stored. Biases,
    which have the engine's dtype in every format, are not counted.
    """
    weights = inputs * outputs
    q = quantization
    groups = -(-inputs // q.group_size) if q.group_size > 0 else 1
    match q.scheme:
        case Scheme.NONE:
            return weights * dtype_bytes
        case Scheme.FP8:
            if q.group_size:
                return weights + groups * -(-outputs // q.group_size) * SCALE_BYTES
            return weights + SCALE_BYTES
        case Scheme.INT8:
            return weights + outputs * SCALE_BYTES
        case Scheme.AWQ | Scheme.GPTQ:
            size = -(-weights * q.bits // 8) + groups * outputs * dtype_bytes
            if q.zero_points:
                size += groups * -(-outputs * q.bits // 8)
            if q.activation_order:
                size += inputs * 4
            return size
        case Scheme.BITSANDBYTES:
            return -(-weights * q.bits // 8) + -(-weights // BITSANDBYTES_BLOCK) * SCALE_BYTES
        case Scheme.NVFP4 | Scheme.MXFP4 | Scheme.MXFP8:
            size = -(-weights * q.bits // 8) + groups * outputs
            return size + (SCALE_BYTES if q.scheme is Scheme.NVFP4 else 0)
        case Scheme.GGUF:
            return gguf_bytes(weights, q.gguf_type)
        case Scheme.MIXED:
            raise ValueError("a mixed format has no size of its own: use the format of the matrix's module")


def runs_on(quantization: Quantization, capability: int) -> tuple[bool, str]:
    """Whether a GPU of ``capability`` (compute capability x 10) runs the format, and how it does or why
    not."""
    for _, part in quantization.parts:
        runs, why = runs_on(part, capability)
        if not runs:
            return runs, why
    need = HARDWARE[quantization.scheme]
    if capability < need.minimum:
        return False, (
            f"{quantization.label} needs compute capability {need.minimum / 10:.1f}, this GPU has "
            f"{capability / 10:.1f} ({need.source})"
        )
    if capability < need.native:
        return True, f"stored in {quantization.scheme}, computed in 16 bit ({need.source})"
    return True, need.source
