"""What a checkpoint's files hold, from their headers alone: safetensors and GGUF.

Formats: https://github.com/huggingface/safetensors#format and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from controlplane.core.sizing.quantization import GGUF_BLOCKS, gguf_bytes
from controlplane.errors import SetupError

MAX_HEADER_BYTES = 100 * 1024 * 1024
"""The safetensors library refuses longer headers, and so do we."""

_GGUF_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 10_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file."""

    metadata: dict[str, Any]
    """Scalars and strings; of an array only its length."""
    tensors: tuple[StoredTensor, ...]

    @property
    def size_bytes(self) -> int:
        """All tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def safetensors_tensors(paths: Iterable[Path]) -> tuple[StoredTensor, ...]:
    """Every tensor in the files, from their headers. SetupError if a file is no safetensors file."""
    found: list[StoredTensor] = []
    for path in paths:
        with path.open("rb") as file:
            found += _safetensors_header(file, path)
    return tuple(found)


def _safetensors_header(file: IO[bytes], path: Path) -> list[StoredTensor]:
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
        return [
            StoredTensor(
                name,
                str(entry["dtype"]),
                prod(entry["shape"]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SetupError(f"{path} is no readable safetensors file ({error}): download it again") from error


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file (version 2 or 3). SetupError if it is none."""
    try:
        with path.open("rb") as file:
            return _gguf_header(file)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is no readable GGUF file ({error}): download it again") from error


def _gguf_header(file: IO[bytes]) -> GgufFile:
    if file.read(4) != b"GGUF":
        raise ValueError("it doesn't begin with GGUF")
    (version,) = struct.unpack("<I", file.read(4))
    if version not in {2, 3}:
        raise ValueError(f"version {version} is not known")
    tensors, pairs = struct.unpack("<QQ", file.read(16))
    if max(tensors, pairs) > _MAX_ITEMS:
        raise ValueError("its header announces too many entries")
    metadata = {}
    for _ in range(pairs):
        key = _string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        metadata[key] = _value(file, kind)
    return GgufFile(metadata, tuple(_gguf_tensor(file) for _ in range(tensors)))


def _gguf_tensor(file: IO[bytes]) -> StoredTensor:
    name = _string(file)
    (rank,) = struct.unpack("<I", file.read(4))
    if rank > 8:
        raise ValueError(f"tensor '{name}' has {rank} dimensions")
    shape = struct.unpack(f"<{rank}Q", file.read(8 * rank))
    kind, _offset = struct.unpack("<IQ", file.read(12))
    dtype = _GGUF_TYPES.get(kind, "")
    if dtype not in GGUF_BLOCKS:
        raise ValueError(f"tensor '{name}' has the unknown type {kind}")
    elements = prod(shape)
    return StoredTensor(name, dtype, elements, gguf_bytes(elements, dtype))


def _string(file: IO[bytes]) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        raise ValueError("a string is too long")
    return file.read(length).decode()


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, count = struct.unpack("<IQ", file.read(12))
        if count > _MAX_ITEMS:
            raise ValueError("an array is too long")
        if item in _SCALARS:
            file.seek(count * struct.calcsize(_SCALARS[item]), 1)
        else:
            for _ in range(count):
                _value(file, item)
        return count
    (value,) = struct.unpack(f"<{_SCALARS[kind]}", file.read(struct.calcsize(_SCALARS[kind])))
    return value
