"""The layout of vLLM's KV cache: bytes per block, blocks per request, blocks in a memory budget.

Follows ``vllm/v1/core/kv_cache_utils.py`` and ``kv_cache_interface.py`` (0.32). All layers of one kind
(full or sliding attention) share block tables. In a model with both, layers are grouped so that all groups
have the same number of layers and take blocks of one size from one pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.sizing.architecture import ModelSpec


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share a block table."""

    layers: tuple[int, ...]
    window: int
    """Sliding window in tokens; 0 means full attention."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV cache of one pipeline stage on one GPU."""

    page_bytes: int
    """Bytes of one block of one layer."""
    block_tokens: int
    layers_per_block: int
    """Layers that one block holds: those of the largest group in this stage."""
    windows: tuple[int, ...]
    """The window of each group in tokens; 0 means full attention."""
    in_flight_tokens: int
    """Tokens scheduled but not finished, which sliding-window layers store in addition to their window."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool."""
        return self.page_bytes * self.layers_per_block

    def blocks_in(self, budget_bytes: int) -> int:
        """Blocks that fit into ``budget_bytes``, as vLLM counts them."""
        if not self.block_bytes:
            return 0
        return max(0, budget_bytes) // self.block_bytes

    def blocks_for(self, length: int) -> int:
        """Maximum number of blocks that one sequence of ``length`` tokens occupies."""
        return sum(self._group_blocks(window, length) for window in self.windows)

    def _group_blocks(self, window: int, length: int) -> int:
        if not window:
            return -(-length // self.block_tokens)
        stored = min(window - 1 + self.in_flight_tokens, length)
        return -(-stored // self.block_tokens) + 1

    def longest(self, usable_blocks: int, limit: int) -> int:
        """Tokens of the longest sequence, up to ``limit``, that ``usable_blocks`` can hold; 0 if not even one
        token fits."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks_for(middle) <= usable_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def kv_heads_per_rank(model: ModelSpec, tp: int) -> int:
    """KV heads of one rank: at least one, so heads are replicated if there are fewer heads than ranks."""
    return max(1, model.kv_heads // tp)


def page_bytes(model: ModelSpec, tp: int, block_tokens: int, kv_bytes: int) -> int:
    """Bytes of one layer's block on one rank.

    MHA and GQA cache a key and a value per KV head, split over ranks; MLA caches one latent vector per token
    (``kv_lora_rank + qk_rope_head_dim`` values), replicated on every rank.
    """
    if model.mla:
        return block_tokens * model.mla.cache_dim * kv_bytes
    return block_tokens * 2 * kv_heads_per_rank(model, tp) * model.head_dim * kv_bytes


def kv_bytes_per_token(model: ModelSpec, tp: int, kv_bytes: int) -> int:
    """Bytes of one token on one rank over all layers, as if all had full attention."""
    return len(model.layers) * page_bytes(model, tp, 1, kv_bytes)


def kv_groups(model: ModelSpec, hybrid: bool = True) -> tuple[KvGroup, ...]:
    """The layers of the whole model, in the groups that vLLM forms.

    Without ``hybrid``, a model with both kinds of layers stores every token in every layer.
    """
    buckets: dict[int, list[int]] = {}
    for layer, kind in enumerate(model.layers):
        buckets.setdefault(kind.window, []).append(layer)
    if len(buckets) > 1 and not hybrid:
        buckets = {0: list(range(len(model.layers)))}
    if len(buckets) == 1:
        window, layers = next(iter(buckets.items()))
        return (KvGroup(tuple(layers), window),)
    sizes = [len(layers) for layers in buckets.values()]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    groups = []
    for window, layers in buckets.items():
        count = -(-len(layers) // size)
        groups += [KvGroup(tuple(layers[i::count]), window) for i in range(count)]
    return tuple(groups)


def kv_layout(
    model: ModelSpec,
    *,
    tp: int,
    stage: range,
    block_tokens: int,
    kv_bytes: int,
    in_flight_tokens: int,
    hybrid: bool = True,
) -> KvLayout:
    """The KV cache on one GPU of the pipeline stage that runs the layers ``stage``."""
    groups = kv_groups(model, hybrid)
    per_group = [sum(layer in stage for layer in group.layers) for group in groups]
    return KvLayout(
        page_bytes=page_bytes(model, tp, block_tokens, kv_bytes),
        block_tokens=block_tokens,
        layers_per_block=max(per_group),
        windows=tuple(group.window for group in groups),
        in_flight_tokens=in_flight_tokens,
    )
