"""Runs inside vLLM's workers (``--worker-extension-cls``) and reports the bytes that they hold.

On CPU vLLM hands most matrices to oneDNN, which stores them in its own layout outside the model's parameters.
Importing this module, which a worker does before it loads the model, wraps that function with a counter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

handed_over = {"moved": 0, "copied": 0}
"""Bytes of matrices that oneDNN took over, and of those of which it holds a second copy."""


class MemoryProbe:
    """A worker with one more method; vLLM mixes it into its own worker class."""

    model_runner: Any

    def tierplane_memory(self) -> dict[str, int]:
        """Bytes of weights, of buffers that are not parameters, of second copies, of the KV cache, and the
        resident set."""
        seen: set[int] = set()

        def fresh(tensors: Iterable[Any]) -> int:
            total = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
            return total

        model = self.model_runner.get_model()
        return {
            "weights": fresh(parameter.data for parameter in model.parameters()) + handed_over["moved"],
            "buffers": fresh(model.buffers()),
            "copies": handed_over["copied"],
            "kv_cache": fresh(self.model_runner.kv_caches),
            "resident": resident_bytes(os.getpid()),
        }


def resident_bytes(pid: int) -> int:
    """The resident set of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _counting(take_over: Callable[..., None]) -> Callable[..., None]:
    copied: set[int] = set()

    def counted(layer: Any, *args: Any, **kwargs: Any) -> None:
        size = layer.weight.untyped_storage().nbytes()
        take_over(layer, *args, **kwargs)
        packed = bool(layer.cpu_linear.__code__.co_freevars)  # the fallback closes over nothing
        if layer.weight.numel() == 0:
            handed_over["moved"] += size
        elif packed and id(layer) not in copied:
            copied.add(id(layer))
            handed_over["copied"] += size

    return counted


def _install() -> None:
    """Only in vLLM's own processes; the tests import this file without vLLM."""
    try:
        from vllm.model_executor.layers import utils
    except ImportError:
        return
    utils.dispatch_cpu_unquantized_gemm = _counting(utils.dispatch_cpu_unquantized_gemm)


if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
    _install()
