"""Cordoned GPUs in Ray's own accounting: an actor that holds one GPU of the node, and does nothing.

Ray counts a node's GPUs without knowing which is which. For each GPU that is out of use, one that Ray counts
is taken away, so that nothing is scheduled on the node that would find no healthy one. The actor is asked for
before what runs there is told to leave: it waits in the node's queue and takes the GPU that becomes free.
It is an actor, not a placement group, because only actors wait in that queue.

The actors are named and detached: a controller that restarts finds them again.
"""

from __future__ import annotations

from collections.abc import Mapping

import ray
import ray.util
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = structlog.stdlib.get_logger(__name__)

NAME_PREFIX = "cordon-"


class HeldGpu:
    """Holds what Ray gave it."""

    def ping(self) -> str:
        """Answers once it holds its GPU."""
        return "held"


def hold_gpus(namespace: str, wanted: Mapping[str, str], gpus_of_node: Mapping[str, int]) -> bool:
    """Have exactly the GPUs ``wanted`` (UUID → node id) held; whether anything changed. Blocks.

    Nodes that Ray counts no (more) GPUs on are passed over: there is nothing to take away. ``gpus_of_node``
    are the nodes that are alive.
    """
    held = held_gpus(namespace)
    left = dict(gpus_of_node)
    should: dict[str, str] = {}
    for uuid, node_id in sorted(wanted.items()):
        if left.get(node_id, 0) > 0:
            left[node_id] -= 1
            should[uuid] = node_id
    changed = False
    for uuid in sorted(held - should.keys()):
        changed |= _let_go(uuid, namespace)
    for uuid in sorted(should.keys() - held):
        changed |= _hold(uuid, should[uuid], namespace)
    return changed


def held_gpus(namespace: str) -> set[str]:
    """UUIDs that are held or waited for. Blocks."""
    return {
        actor["name"].removeprefix(NAME_PREFIX)
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == namespace and actor["name"].startswith(NAME_PREFIX)
    }


def let_go_of_all(namespace: str) -> int:
    """End all of the namespace; how many there were. Blocks."""
    return sum(_let_go(uuid, namespace) for uuid in sorted(held_gpus(namespace)))


def _hold(uuid: str, node_id: str, namespace: str) -> bool:
    actor = ray.remote(num_cpus=0, num_gpus=1)(HeldGpu)
    try:
        actor.options(
            name=NAME_PREFIX + uuid,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            # without its process the GPU would be free again
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote()
    except (RayError, ValueError) as error:
        log.warning("a cordoned GPU is not held in Ray", gpu=uuid, node_id=node_id, error=str(error))
        return False
    return True


def _let_go(uuid: str, namespace: str) -> bool:
    try:
        ray.kill(ray.get_actor(NAME_PREFIX + uuid, namespace=namespace), no_restart=True)
    except (RayError, ValueError):
        return False  # it has just ended
    return True
