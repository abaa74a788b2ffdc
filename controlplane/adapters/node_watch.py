"""The controller's eyes: keeps an agent on every node and asks each for what is new.

Each look starts a question to every agent that has none open, and what comes back is handed over as it
arrives. A node that does not answer holds nobody up: its readings grow old, which is what they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from ray.exceptions import RayActorError, RayError

from controlplane.adapters.ray_node_agent import alive_nodes, ensure_node_agents
from controlplane.core.samples import GpuEvent, NodeSample

log = structlog.stdlib.get_logger(__name__)

ANSWER_TIMEOUT_S = 10.0

OnNews = Callable[[str, Sequence[NodeSample], Sequence[GpuEvent]], None]


class NodeWatch:
    """For one event loop."""

    def __init__(self, namespace: str, interval_s: float, on_news: OnNews) -> None:
        self._namespace = namespace
        self._interval_s = interval_s
        self._on_news = on_news
        self._agents: dict[str, Any] = {}
        self._open: dict[str, asyncio.Task[None]] = {}
        self._heard: dict[str, tuple[str, int]] = {}
        """Node id → epoch and number of the last event heard."""

    async def look(self) -> dict[str, int] | None:
        """Ask every node; those that Ray has with their GPUs as it counts them, None if it can't tell now."""
        try:
            alive = await asyncio.to_thread(alive_nodes)
            if not alive:
                return None
            self._agents = {node: agent for node, agent in self._agents.items() if node in alive}
            if alive.keys() - self._agents.keys():
                self._agents = await asyncio.to_thread(
                    ensure_node_agents,
                    self._namespace,
                    interval_s=self._interval_s,
                    known=self._agents,
                    nodes=alive,
                )
        except (RayError, RuntimeError, OSError) as error:
            log.warning("Ray does not tell its nodes", error=str(error))
            return None
        for node_id, agent in self._agents.items():
            if node_id not in self._open:
                self._open[node_id] = asyncio.create_task(self._ask(node_id, agent))
        return alive

    async def close(self) -> None:
        """Ask nobody any more."""
        for task in self._open.values():
            task.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _ask(self, node_id: str, agent: Any) -> None:
        epoch, seq = self._heard.get(node_id, ("", 0))
        try:
            answer = await asyncio.wait_for(_result(agent.news.remote(epoch, seq)), ANSWER_TIMEOUT_S)
            sample, events = answer
            if events:
                self._heard[node_id] = (events[-1].epoch, events[-1].seq)
            elif sample is not None and sample.epoch != epoch:
                self._heard[node_id] = (sample.epoch, 0)
            self._on_news(node_id, () if sample is None else (sample,), events)
        except RayActorError as error:
            log.warning("a node agent is gone", node_id=node_id, error=str(error).strip().splitlines()[0])
            self._agents.pop(node_id, None)
        except (RayError, TimeoutError) as error:
            log.warning("a node agent does not answer", node_id=node_id, error=repr(error)[:300])
        finally:
            self._open.pop(node_id, None)


async def _result(ref: Any) -> Any:
    return await ref
