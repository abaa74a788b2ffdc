"""How vLLM lays out its KV cache: bytes of a block, blocks of a request, blocks in a budget.

Follows ``vllm/v1/core/kv_cache_utils.py`` and ``kv_cache_interface.py`` (0.32). All layers of one kind
(full or sliding attention) share block tables; in a model with both, layers are grouped so that every
group has the same number of layers, and all groups draw blocks of one size from one pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.sizing.architecture import ModelSpec


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share a block table."""

    layers: tuple[int, ...]
    window: int
    """0: full attention."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV cache of one pipeline stage on one GPU."""

    page_bytes: int
    """One block of one layer."""
    block_tokens: int
    layers_per_block: int
    """Layers that one block holds: the largest group's share in this stage."""
    windows: tuple[int, ...]
    """Per group its window; 0: full attention."""
    in_flight_tokens: int

    @property
    def block_bytes(self) -> int:
        """One block of the pool."""
        return self.page_bytes * self.layers_per_block

    def blocks_in(self, budget_bytes: int) -> int:
        """Blocks that fit in a budget, as vLLM counts them."""
        if not self.block_bytes:
            return 0
        return max(0, budget_bytes) // self.block_bytes

    def blocks_for(self, length: int) -> int:
        """Blocks that one sequence of ``length`` tokens may hold."""
        return sum(self._group_blocks(window, length) for window in self.windows)

    def _group_blocks(self, window: int, length: int) -> int:
        if not window:
            return -(-length // self.block_tokens)
        kept = min(window - 1 + self.in_flight_tokens, length)
        return -(-kept // self.block_tokens) + 1

    def longest(self, usable_blocks: int, limit: int) -> int:
        """The longest sequence, up to ``limit``, whose blocks fit; 0 if not even one token does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks_for(middle) <= usable_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def kv_heads_per_rank(model: ModelSpec, tp: int) -> int:
    """KV heads that one rank holds: never less than one, so few heads are replicated."""
    return max(1, model.kv_heads // tp)


def page_bytes(model: ModelSpec, tp: int, block_tokens: int, kv_bytes: int) -> int:
    """Bytes of one layer's block on one rank.

    MHA and GQA cache a key and a value per KV head, cut over ranks; MLA caches one latent vector per token
    (``kv_lora_rank + qk_rope_head_dim`` values) that every rank holds whole.
    """
    if model.mla:
        return block_tokens * model.mla.cache_dim * kv_bytes
    return block_tokens * 2 * kv_heads_per_rank(model, tp) * model.head_dim * kv_bytes


def kv_bytes_per_token(model: ModelSpec, tp: int, kv_bytes: int, layers: int | None = None) -> int:
    """Bytes that one token of a full-attention sequence takes on one rank, over ``layers`` (all)."""
    count = len(model.layers) if layers is None else layers
    return count * page_bytes(model, tp, 1, kv_bytes)


def kv_groups(model: ModelSpec, hybrid: bool = True) -> tuple[KvGroup, ...]:
    """The layers of the whole model, grouped as vLLM groups them.

    Without ``hybrid`` a model with both kinds keeps every token of every layer.
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
    """The KV cache of the pipeline stage that runs the layers ``stage``."""
    groups = kv_groups(model, hybrid)
    per_group = [sum(layer in stage for layer in group.layers) for group in groups]
    return KvLayout(
        page_bytes=page_bytes(model, tp, block_tokens, kv_bytes),
        block_tokens=block_tokens,
        layers_per_block=max(per_group),
        windows=tuple(group.window for group in groups),
        in_flight_tokens=in_flight_tokens,
    )
