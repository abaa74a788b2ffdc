"""Generates a RayService from a Serve config file.

``serveConfigV2`` is that file with three changes that a cluster of pods needs: each tier and the gateway run
in their own worker group (each with a custom Ray resource), nothing listens on loopback, and tiers that scale
share the GPUs that pods can be added for, not only the GPUs of existing pods.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import ceil
from typing import Any, Final

import yaml

from controlplane.config import IMPORT_PATH, ServeFile, TierConfig
from controlplane.errors import ConfigError, Problem
from controlplane.kubernetes.overlays import Overlay
from controlplane.kubernetes.pods import (
    ENGINE_STOP_S,
    GATEWAY_DRAIN_S,
    MARGIN_S,
    Manifest,
    container_security,
    gateway_pod,
    group_name,
    head_pod,
    labels,
    start_params,
    tier_pod,
)
from controlplane.kubernetes.requests import PodNeed, pod_need
from controlplane.ray_cluster.actor_options import actor_options

RAY_VERSION: Final = "2.60.0"
"""Ray's version in the images; a test compares it with ``.locks/core.txt``."""
GATEWAY_RESOURCE: Final = "tierplane-gateway"
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - inside the pod; the network policy restricts access


def render(file: ServeFile, overlay: Overlay) -> Manifest:
    """The RayService. Raises ConfigError with every tier that can't run on the overlay's nodes."""
    needs = _needs(file, overlay)
    config = file.plane
    if not config.gateway.port:
        message, remedy = "pods need the gateway's own port", "set it to 8080"
        raise ConfigError([Problem("gateway.port", message, remedy)], str(file.path))
    drains_s = [round(tier.drain_timeout_s) + ENGINE_STOP_S for tier in config.tiers]
    cluster: Manifest = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": overlay.autoscale,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {**start_params(0, {}), "dashboard-host": _EVERYWHERE},
            "template": head_pod(config, overlay),
        },
        "workerGroupSpecs": [
            _gateway_group(file, overlay),
            *(_tier_group(file, i, need, overlay) for i, need in enumerate(needs)),
        ],
    }
    if overlay.autoscale:
        cluster["autoscalerOptions"] = {
            "upscalingMode": "Default",
            # Longer than an engine's start, so that a node is not removed before it was used.
            "idleTimeoutSeconds": 600,
            "resources": {
                "requests": {"cpu": "500m", "memory": "512Mi"},
                "limits": {"memory": "512Mi"},
            },
            "securityContext": container_security(),
        }
    if overlay.redis:
        cluster["gcsFaultToleranceOptions"] = {
            "redisAddress": "tierplane-redis:6379",
            "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "tierplane-redis", "key": "password"}}},
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "tierplane", "labels": labels("plane")},
        "spec": {
            # A change to serveConfigV2 alone is applied in place; any other change starts a new cluster, and
            # traffic moves to it when it is ready.
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": max([GATEWAY_DRAIN_S, *drains_s]) + MARGIN_S,
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.safe_dump(serve_config(file, overlay), sort_keys=False, width=100),
            "rayClusterConfig": cluster,
        },
    }


def serve_config(file: ServeFile, overlay: Overlay) -> dict[str, Any]:
    """The file's settings with placement in worker groups, without loopback addresses and, if pods are added
    on demand, with the most GPUs that the tiers may use."""
    values: dict[str, Any] = copy.deepcopy(dict(file.raw))
    http = values.setdefault("http_options", {})
    if http.get("host") in _LOOPBACK:
        http["host"] = _EVERYWHERE
    ours = next(app for app in values["applications"] if app.get("import_path") == IMPORT_PATH)
    gateway = ours["args"].setdefault("gateway", {})
    if file.plane.gateway.host in _LOOPBACK:
        gateway["host"] = _EVERYWHERE
    if ours["args"].get("engine_host") == "loopback":
        ours["args"]["engine_host"] = "node"
    plane = file.plane
    if overlay.autoscale and plane.controller.scaling.gpus is None and any(map(_scales_gpus, plane.tiers)):
        most = sum(_most_replicas(tier) * tier.engine_gpus for tier in plane.tiers)
        ours["args"].setdefault("controller", {}).setdefault("scaling", {})["gpus"] = round(most, 6)
    # Serve replaces a deployment's actor options as a whole, so all of them are set.
    placed = [_placed("gateway", {"num_cpus": file.plane.gateway.cpus}, GATEWAY_RESOURCE)]
    placed += [_placed(tier.name, actor_options(tier), tier_resource(tier.name)) for tier in file.plane.tiers]
    ours["deployments"] = placed
    return values


def _scales_gpus(tier: TierConfig) -> bool:
    return tier.scaling is not None and tier.engine_gpus > 0


def _most_replicas(tier: TierConfig) -> int:
    return tier.scaling.max_replicas if tier.scaling else tier.replicas


def tier_resource(name: str) -> str:
    """The custom Ray resource of a tier's pods, one unit per replica."""
    return f"tierplane-tier-{group_name(name)}"


def _placed(name: str, options: Mapping[str, Any], resource: str) -> dict[str, Any]:
    return {"name": name, "ray_actor_options": {**options, "resources": {resource: 1}}}


def _needs(file: ServeFile, overlay: Overlay) -> list[PodNeed]:
    needs: list[PodNeed] = []
    problems: list[Problem] = []
    for tier in file.plane.tiers:
        try:
            needs.append(pod_need(tier, overlay))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems, str(file.path))
    return needs


def _gateway_group(file: ServeFile, overlay: Overlay) -> Manifest:
    gateway = file.plane.gateway
    return {
        "groupName": "gateway",
        **_size(gateway.replicas, gateway.replicas, overlay),
        # Room for the new gateway beside the old one while a configuration changes.
        "rayStartParams": start_params(ceil(2 * gateway.cpus), {GATEWAY_RESOURCE: 2}),
        "template": gateway_pod(file.plane, overlay, file.http_port),
    }


def _tier_group(file: ServeFile, index: int, need: PodNeed, overlay: Overlay) -> Manifest:
    tier = file.plane.tiers[index]
    pods = ceil(tier.replicas / need.replicas)
    most = ceil((_most_replicas(tier) + tier.rollout_surge) / need.replicas)
    fewest = ceil(tier.scaling.min_replicas / need.replicas) if tier.scaling else pods
    cpus = ceil(tier.cpus * need.replicas)
    return {
        "groupName": f"tier-{group_name(tier.name)}",
        **_size(pods, most, overlay, fewest=fewest),
        "rayStartParams": start_params(cpus, {tier_resource(tier.name): need.replicas}),
        "template": tier_pod(file.plane, tier, need, overlay, file.http_port),
    }


def _size(pods: int, most: int, overlay: Overlay, *, fewest: int | None = None) -> dict[str, int]:
    """The replica settings of a worker group.

    ``pods`` is the number at the start, ``most`` the number with all that scaling and a change of the
    configuration may add, and ``fewest`` the number that scaling may reduce it to (by default ``pods``).
    """
    if not overlay.autoscale:
        return {"replicas": most, "minReplicas": most, "maxReplicas": max(1, most)}
    return {
        "replicas": pods,
        "minReplicas": pods if fewest is None else min(fewest, pods),
        "maxReplicas": max(1, most, ceil(pods * overlay.surge_ratio)),
    }
