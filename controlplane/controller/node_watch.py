"""The controller's eyes: keeps an agent on every node and asks each for what is new.

Each look starts a question to every agent that has none open, and what comes back is handed over as it
arrives. A node that does not answer holds nobody up: its readings grow old, which is what they are.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import structlog
from ray.exceptions import RayActorError, RayError

from controlplane.core.telemetry.node_updates import NOTHING_CACHED, GpuInfoCache, NodeUpdate, whole_sample
from controlplane.core.telemetry.samples import GpuEvent, NodeSample
from controlplane.node_agent.ray_actor import alive_nodes, ensure_node_agents

log = structlog.stdlib.get_logger(__name__)

ANSWER_TIMEOUT_S = 10.0
LIST_INTERVAL_S = 2.0
"""Ray is asked for its nodes no more often: the list of a large cluster is long."""
RECENT_S = 600.0
"""Events from before a controller's first contact with an agent count if they are not older."""

OnNews = Callable[[str, NodeSample | None, Sequence[GpuEvent]], None]


class NodeWatch:
    """For one event loop."""

    def __init__(
        self,
        namespace: str,
        interval_s: float,
        on_news: OnNews,
        heard: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        self._namespace = namespace
        self._interval_s = interval_s
        self._on_news = on_news
        self._agents: dict[str, Any] = {}
        self._open: dict[str, asyncio.Task[None]] = {}
        self._heard: dict[str, tuple[str, int]] = dict(heard or {})
        self._infos: dict[str, GpuInfoCache] = {}
        """Node id → what rarely changes of its GPUs, as its agent said it last."""
        self._alive: dict[str, int] = {}
        self._listed_s = -math.inf

    @property
    def heard(self) -> Mapping[str, tuple[str, int]]:
        """Node id → epoch and number of the last event that was heard of its agent. Who starts again with it
        hears nothing twice: an old XID is no reason to take a GPU away that has returned since."""
        return MappingProxyType(self._heard)

    async def look(self) -> dict[str, int] | None:
        """Ask every node; those that Ray has with their GPUs as it counts them, None if it can't tell now."""
        try:
            if time.monotonic() - self._listed_s >= LIST_INTERVAL_S:
                await self._list()
        except (RayError, RuntimeError, OSError) as error:
            log.warning("Ray does not tell its nodes", error=str(error))
            self._alive = {}
        for node_id, agent in self._agents.items():
            if node_id not in self._open:
                self._open[node_id] = asyncio.create_task(self._ask(node_id, agent))
        return self._alive or None

    async def _list(self) -> None:
        """Which nodes there are; makes the agents that are missing."""
        alive = self._alive = await asyncio.to_thread(alive_nodes)
        if not alive:
            return
        self._listed_s = time.monotonic()
        self._agents = {node: agent for node, agent in self._agents.items() if node in alive}
        for kept in (self._heard, self._infos):
            for gone in kept.keys() - alive.keys() - self._open.keys():
                del kept[gone]
        if alive.keys() - self._agents.keys():
            self._agents = await asyncio.to_thread(
                ensure_node_agents,
                self._namespace,
                interval_s=self._interval_s,
                known=self._agents,
                nodes=alive,
            )

    async def close(self) -> None:
        """Ask nobody any more."""
        for task in self._open.values():
            task.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _ask(self, node_id: str, agent: Any) -> None:
        epoch, seq = self._heard.get(node_id, ("", 0))
        try:
            known = self._infos.get(node_id)
            asked = agent.update.remote(epoch, seq, known.key if known is not None else NOTHING_CACHED)
            news: NodeUpdate = await asyncio.wait_for(_result(asked), ANSWER_TIMEOUT_S)
            events = news.events
            if events:
                self._heard[node_id] = (events[-1].epoch, events[-1].seq)
            elif news.sample is not None and news.sample.epoch != epoch:
                self._heard[node_id] = (news.sample.epoch, 0)
            sample = self._whole(node_id, news)
            fresh = recent(events, news.sample) if not epoch else events
            self._on_news(node_id, sample, fresh)
        except RayActorError as error:
            log.warning("a node agent is gone", node_id=node_id, error=str(error).strip().splitlines()[0])
            self._agents.pop(node_id, None)
            self._listed_s = -math.inf
        except (RayError, TimeoutError) as error:
            log.warning("a node agent does not answer", node_id=node_id, error=repr(error)[:300])
        except Exception as error:
            log.exception("what a node agent said could not be taken in", node_id=node_id, error=repr(error))
        finally:
            self._open.pop(node_id, None)

    def _whole(self, node_id: str, news: NodeUpdate) -> NodeSample | None:
        """The sample with what rarely changes of its GPUs, which is kept for the next one."""
        if news.infos is not None:
            self._infos[node_id] = news.infos
        sample = whole_sample(news, self._infos.get(node_id))
        if sample is None:
            self._infos.pop(node_id, None)  # the next answer has everything
        return sample


def recent(events: Sequence[GpuEvent], sample: NodeSample | None) -> Sequence[GpuEvent]:
    """Of an agent that was never heard before: what is not too old to count, by the agent's own clock."""
    if sample is None:
        return events
    return [event for event in events if sample.unix_s - event.unix_s <= RECENT_S]


async def _result(ref: Any) -> Any:
    return await ref
