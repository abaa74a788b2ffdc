"""Runs inside vLLM's workers (``--worker-extension-cls``): what they really hold, in bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class MemoryProbe:
    """A worker with one more method; vLLM mixes it into its own worker class."""

    model_runner: Any

    def tierplane_memory(self) -> dict[str, int]:
        """Bytes of all parameters, of buffers that are not parameters, and of the KV cache; resident set."""
        seen: set[int] = set()

        def fresh(tensors: Any) -> int:
            total = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += tensor.numel() * tensor.element_size()
            return total

        model = self.model_runner.get_model()
        return {
            "weights": fresh(parameter.data for parameter in model.parameters()),
            "buffers": fresh(model.buffers()),
            "kv_cache": fresh(self.model_runner.kv_caches),
            "resident": resident_bytes(os.getpid()),
        }


def resident_bytes(pid: int) -> int:
    """The resident set of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
