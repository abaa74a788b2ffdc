"""The KV cache of a planned engine: blocks, tokens and the longest sequence, on GPUs and on CPUs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.kv_cache import KvLayout


@dataclass(frozen=True, slots=True)
class EnginePlan(ABC):
    """An engine with its memory."""

    model: ModelSpec
    settings: EngineArgs
    dtype: str
    """In which the engine computes."""

    @property
    @abstractmethod
    def layout(self) -> KvLayout:
        """The KV cache of the first pipeline stage."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """KV blocks as vLLM reports them: the smallest number over all workers."""

    @property
    def usable_blocks(self) -> int:
        """Blocks that sequences can use: vLLM reserves one."""
        return max(0, self.blocks - 1)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that the engine accepts: ``max-model-len``, or as many as fit."""
        if self.settings.max_length < 0:
            return self.longest
        return self.settings.length(self.model)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits alone, up to the model's own limit."""
        return self.layout.longest(self.usable_blocks, self.model.max_length)

    @property
    def kv_tokens(self) -> int:
        """vLLM's «KV cache size: N tokens»: sequences of maximum length that fit at once, times their
        length."""
        needed = self.layout.blocks_for(self.length)
        return int(self.blocks / needed * self.length) if needed else 0
