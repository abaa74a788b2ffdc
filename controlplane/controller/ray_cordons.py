"""Cordoned GPUs in Ray's own accounting: each is represented by an actor that holds one GPU of its node.

Ray counts a node's GPUs but can't say which is which. For each GPU out of use, an actor takes one GPU from
the count, so that Ray schedules no replica on a node that has no healthy GPU for it. The actor is created
before the replica on the GPU gets the command to retire: it waits in the node's queue and takes the GPU that
becomes free. It is an actor, not a placement group, because only actors wait in that queue.

The actors are named and detached: a controller that restarts finds them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import ray
import ray.util
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = structlog.stdlib.get_logger(__name__)

NAME_PREFIX = "cordon-"


class HeldGpu:
    """Holds the GPU that Ray assigned to it."""


def hold_gpus(namespace: str, wanted: Mapping[str, str], gpus_of_node: Mapping[str, int]) -> None:
    """Hold exactly the GPUs ``wanted`` (UUID → node id). Blocks.

    ``gpus_of_node`` are the nodes that are alive, with the number of GPUs that Ray counts there: no more than
    that can be held on a node.
    """
    held = held_gpus(namespace)
    left = dict(gpus_of_node)
    should: dict[str, str] = {}
    for uuid, node_id in sorted(wanted.items()):
        if left.get(node_id, 0) > 0:
            left[node_id] -= 1
            should[uuid] = node_id
    for uuid in sorted(held - should.keys()):
        _release(uuid, namespace)
    for uuid in sorted(should.keys() - held):
        _hold(uuid, should[uuid], namespace)


def held_gpus(namespace: str) -> set[str]:
    """UUIDs of the GPUs that an actor holds or waits for. Blocks."""
    return {
        actor["name"].removeprefix(NAME_PREFIX)
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == namespace and actor["name"].startswith(NAME_PREFIX)
    }


def release_all_gpus(namespace: str) -> None:
    """End all actors of the namespace. Blocks."""
    for uuid in sorted(held_gpus(namespace)):
        _release(uuid, namespace)


def _hold(uuid: str, node_id: str, namespace: str) -> None:
    actor = ray.remote(num_cpus=0, num_gpus=1)(HeldGpu)
    try:
        actor.options(
            name=NAME_PREFIX + uuid,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            # Without its process the GPU would be free again.
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote()
    except (RayError, ValueError) as error:
        log.warning(
            "a cordoned GPU is not held in Ray's accounting", gpu=uuid, node_id=node_id, error=str(error)
        )


def _release(uuid: str, namespace: str) -> None:
    with contextlib.suppress(RayError, ValueError):  # It has just ended.
        ray.kill(ray.get_actor(NAME_PREFIX + uuid, namespace=namespace), no_restart=True)
