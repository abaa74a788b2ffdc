"""Samples from every node: starts an agent on each node and polls the agents.

Each round starts a request to every agent that has none open, and each response is handed over as it arrives.
A node that does not respond delays no other; its readings grow old, and so become STALE and MISSING.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from ray.exceptions import RayActorError, RayError

from controlplane.controller.handle import CONTROLLER_NAME
from controlplane.core.telemetry.node_updates import NOTHING_CACHED, GpuInfoCache, NodeUpdate, whole_sample
from controlplane.core.telemetry.samples import GpuEvent, NodeSample
from controlplane.node_agent.ray_actor import alive_nodes, ensure_node_agents, living_replicas

log = structlog.stdlib.get_logger(__name__)

RESPONSE_TIMEOUT_S = 10.0
LIST_INTERVAL_S = 2.0
"""The shortest interval between two calls for Ray's list of nodes, which is long for a large cluster."""
RECENT_S = 600.0
"""Events from before a controller's first contact with an agent count if they are at most this old."""

OnUpdate = Callable[[str, NodeSample | None, Sequence[GpuEvent]], None]
"""Gets a node's id, its newest sample, and new events."""


class NodeWatch:
    """For one event loop."""

    def __init__(
        self,
        namespace: str,
        interval_s: float,
        on_update: OnUpdate,
        last_events: Mapping[str, tuple[str, int]],
    ) -> None:
        self._namespace = namespace
        self._interval_s = interval_s
        self._on_update = on_update
        self._agents: dict[str, Any] = {}
        self._open: dict[str, asyncio.Task[None]] = {}
        self.last_events = dict(last_events)
        """Node id → epoch and number of the last event received from its agent. A controller that starts with
        them gets no event twice: an old XID must not take a GPU out of use that has returned since."""
        self._infos: dict[str, GpuInfoCache] = {}
        """Node id → what rarely changes of its GPUs, from its agent's last complete update."""
        self._alive: dict[str, int] = {}
        self.living: frozenset[str] | None = None
        """Unique ids of the Serve replicas whose processes live, by Ray's last list; None if there is none
        yet."""
        self._listed_s = -math.inf

    async def poll(self) -> dict[str, int] | None:
        """Start a request to every agent. Returns the nodes that Ray has, each with the number of GPUs that
        Ray counts there; None if Ray does not respond."""
        try:
            if time.monotonic() - self._listed_s >= LIST_INTERVAL_S:
                await self._list()
        except (RayError, RuntimeError, OSError) as error:
            log.warning("Ray does not list its nodes", error=str(error))
            self._alive = {}
        for node_id, agent in self._agents.items():
            if node_id not in self._open:
                self._open[node_id] = asyncio.create_task(self._request(node_id, agent))
        return self._alive or None

    async def _list(self) -> None:
        """List the nodes, and start the agents that are missing."""
        alive = self._alive = await asyncio.to_thread(alive_nodes)
        if not alive:
            return
        self._listed_s = time.monotonic()
        living = await asyncio.to_thread(living_replicas, CONTROLLER_NAME)
        self.living = self.living if living is None else living
        self._agents = {node: agent for node, agent in self._agents.items() if node in alive}
        for by_node in (self.last_events, self._infos):
            for gone in by_node.keys() - alive.keys() - self._open.keys():
                del by_node[gone]
        if alive.keys() - self._agents.keys():
            self._agents = await asyncio.to_thread(
                ensure_node_agents,
                self._namespace,
                interval_s=self._interval_s,
                known=self._agents,
                nodes=alive,
            )

    async def close(self) -> None:
        """Cancel the open requests."""
        for task in self._open.values():
            task.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _request(self, node_id: str, agent: Any) -> None:
        epoch, seq = self.last_events.get(node_id, ("", 0))
        try:
            known = self._infos.get(node_id)
            pending = agent.update.remote(epoch, seq, known.key if known is not None else NOTHING_CACHED)
            update: NodeUpdate = await asyncio.wait_for(_result(pending), RESPONSE_TIMEOUT_S)
            events = update.events
            if events:
                self.last_events[node_id] = (events[-1].epoch, events[-1].seq)
            elif update.sample is not None and update.sample.epoch != epoch:
                self.last_events[node_id] = (update.sample.epoch, 0)
            if update.infos is not None:
                self._infos[node_id] = update.infos
            sample = whole_sample(update, self._infos.get(node_id))
            if sample is None:
                self._infos.pop(node_id, None)  # The next update is complete.
            self._on_update(node_id, sample, recent(events, update.sample) if not epoch else events)
        except RayActorError as error:
            log.warning("a node agent is gone", node_id=node_id, error=str(error).strip().splitlines()[0])
            self._agents.pop(node_id, None)
            self._listed_s = -math.inf
        except (RayError, TimeoutError) as error:
            log.warning("a node agent does not respond", node_id=node_id, error=repr(error)[:300])
        except Exception as error:
            log.exception("a node agent's update could not be processed", node_id=node_id, error=repr(error))
        finally:
            self._open.pop(node_id, None)


def recent(events: Sequence[GpuEvent], sample: NodeSample | None) -> Sequence[GpuEvent]:
    """The events of an agent's first response that are not too old to count, by the agent's own clock."""
    if sample is None:
        return events
    return [event for event in events if sample.unix_s - event.unix_s <= RECENT_S]


async def _result(ref: Any) -> Any:
    return await ref
