"""Names, types and sizes of a checkpoint's tensors, from the headers of its files: safetensors and GGUF.

GGUF headers are not read with the ``gguf`` package, because its reader creates several array objects for each
token of the vocabulary. For 152,000 tokens with their merges and 720 tensors, version 0.19 takes 6 s of CPU
time, and the reader below takes 0.07 s. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from controlplane.core.sizing.quantization import GGUF_BLOCKS, gguf_bytes
from controlplane.errors import SetupError

_GGUF_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_MAX_ITEMS = 10_000_000
_MAX_STRING_BYTES = 100 * 1024 * 1024


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
    """Scalars and strings; an array is represented by its length."""
    tensors: tuple[StoredTensor, ...]

    @property
    def size_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Open the file memory-mapped, so that only the header and the requested tensors are read. SetupError if
    the header can't be read or doesn't match the file's size."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise SetupError(f"{path} is not a valid safetensors file ({error}): download it again") from error


def safetensors_tensors(paths: Iterable[Path]) -> tuple[StoredTensor, ...]:
    """Every tensor in the files, from their headers. SetupError if a file is not a valid safetensors file."""
    found: list[StoredTensor] = []
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                dtype, elements = tensor.get_dtype(), prod(tensor.get_shape())
                found.append(StoredTensor(name, dtype, elements, elements * _bits(dtype) // 8))
    return tuple(found)


def _bits(dtype: str) -> int:
    """Bits of one element: the first number in the name of its type (8 in ``F8_E4M3``); 8 for ``BOOL``."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def check_gguf(path: Path) -> None:
    """Raise SetupError unless llama.cpp can begin to load ``path``: the first part of a GGUF model, with all
    of its other parts beside it."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise SetupError(f"{path} can't be read: {error.strerror}") from error
    if start != b"GGUF":
        pointer = start == b"vers"
        what = "only a Git LFS pointer to the file" if pointer else "not a GGUF file"
        raise SetupError(f"{path} is {what}: download the model again")
    part = _PART.search(path.name)
    if part is None:
        return
    if int(part[1]) != 1:
        raise SetupError(f"{path} is part {int(part[1])} of a model: name its first part")
    names = [f"{path.name[: part.start()]}-{n:05d}-of-{part[2]}.gguf" for n in range(1, int(part[2]) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise SetupError(f"{missing[0]} is missing beside {path}: download all {int(part[2])} parts")


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file, version 2 or 3. SetupError if the file is anything else."""
    try:
        with path.open("rb") as file:
            return _gguf_header(file)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not a valid GGUF file ({error}): download it again") from error


def _gguf_header(file: IO[bytes]) -> GgufFile:
    if file.read(4) != b"GGUF":
        raise ValueError("it doesn't begin with GGUF")
    (version,) = struct.unpack("<I", file.read(4))
    if version not in {2, 3}:
        raise ValueError(f"version {version} is not supported")
    tensors, pairs = struct.unpack("<QQ", file.read(16))
    if max(tensors, pairs) > _MAX_ITEMS:
        raise ValueError("its header declares too many entries")
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
    if length > _MAX_STRING_BYTES:
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
