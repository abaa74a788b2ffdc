"""Bytes of a matrix in each format."""

from __future__ import annotations

import pytest

from controlplane.core.sizing.quantization import (
    AWQ,
    BNB4,
    FP8,
    FP8_BLOCK,
    GPTQ,
    INT8,
    NONE,
    PRESETS,
    Quantization,
    dtype_name,
    matrix_bytes,
    preset,
    runs_on,
)

IN, OUT = 4096, 11008
WEIGHTS = IN * OUT


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (NONE, WEIGHTS * 2),
        (FP8, WEIGHTS + 4),
        (FP8_BLOCK, WEIGHTS + 32 * 86 * 4),
        (INT8, WEIGHTS + OUT * 4),
        # qweight 4 bit; per group of 128 inputs a 16-bit scale and a 4-bit zero per output.
        (AWQ, WEIGHTS // 2 + 32 * OUT * 2 + 32 * OUT // 2),
        (GPTQ, WEIGHTS // 2 + 32 * OUT * 2 + 32 * OUT // 2 + IN * 4),
        (BNB4, WEIGHTS // 2 + WEIGHTS // 64 * 4),
        (preset("gguf:Q4_0"), WEIGHTS // 32 * 18),
        (preset("gguf:Q8_0"), WEIGHTS // 32 * 34),
        (preset("gguf:Q6_K"), WEIGHTS // 256 * 210),
        (preset("gguf:Q4_K_M"), WEIGHTS // 256 * 144),
    ],
    ids=str,
)
def test_matrix_bytes(quantization: Quantization, expected: int) -> None:
    assert matrix_bytes(quantization, IN, OUT, 2) == expected


def test_float32_weights_take_four_bytes() -> None:
    assert matrix_bytes(NONE, IN, OUT, 4) == WEIGHTS * 4


def test_names() -> None:
    assert {name: preset(name) for name in PRESETS} == PRESETS
    assert dtype_name("torch.bfloat16") == dtype_name("bf16") == "bfloat16"
    for wrong in ("int3", "gguf:Q99"):
        with pytest.raises(KeyError):
            preset(wrong)
    with pytest.raises(KeyError):
        dtype_name("int8")


@pytest.mark.parametrize(
    ("name", "capability", "runs", "words"),
    [
        ("fp8", 70, False, "needs compute capability 7.5"),
        ("fp8", 80, True, "computed in 16 bit"),
        ("fp8", 89, True, "Fp8Config"),
        ("awq", 70, False, "7.0"),
        ("gptq", 70, True, "computed in 16 bit"),
        ("none", 60, True, "every GPU"),
    ],
)
def test_hardware(name: str, capability: int, runs: bool, words: str) -> None:
    ok, why = runs_on(preset(name), capability)
    assert ok is runs
    assert words in why
