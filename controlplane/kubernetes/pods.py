"""Pod templates of the head, the gateway and the tiers.

No container runs as root, can write to its image, or has a Kubernetes token that it does not need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.sizing.gpu_models import GIB
from controlplane.kubernetes.overlays import IMAGE, Overlay
from controlplane.kubernetes.requests import PodNeed, mebibytes
from controlplane.models.catalog import gpu_named
from controlplane.ray_cluster.session import SERVE_ENVIRONMENT

Manifest = dict[str, Any]

USER_ID: Final = 1000
"""The user that the images in ``k8s/docker`` create."""
METRICS_PORT: Final = 6385
AGENT_PORT: Final = 52365
DASHBOARD_PORT: Final = 8265
RAY_PORTS: Final[Mapping[str, str]] = {
    "node-manager-port": "6381",
    "object-manager-port": "6382",
    "dashboard-agent-grpc-port": "6383",
    "runtime-env-agent-port": "6384",
    # KubeRay's default is 8080, the gateway's own port.
    "metrics-export-port": str(METRICS_PORT),
    "dashboard-agent-listen-port": str(AGENT_PORT),
    "min-worker-port": "10002",
    "max-worker-port": "19999",
}
"""Fixed, so that the network policy can allow Ray's ports but not the engines' ports."""

GATEWAY_DRAIN_S: Final = 60
ENGINE_STOP_S: Final = 30
MARGIN_S: Final = 30
"""The time between the end of a drain and Kubernetes' SIGKILL."""

_ENV: Final[Mapping[str, str]] = {
    "HOME": "/home/tierplane",
    "HF_HOME": "/models/hub",
    "TIERPLANE_CACHE_DIR": "/models/tierplane",
    "TIERPLANE_RUN_DIR": "/tmp/tierplane",  # noqa: S108 - the pod's own emptyDir
    **SERVE_ENVIRONMENT,
}


def container_security() -> Manifest:
    """A container's security context, with no privileges."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def head_pod(config: PlaneConfig, overlay: Overlay) -> Manifest:
    """The head pod: Ray's tables, Serve's controller and the dashboard; no engine and no gateway."""
    resources = {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "4Gi"}
    pod = _pod("head", overlay, "ray-head", resources, _env(config), grace_s=60)
    pod["spec"]["serviceAccountName"] = "tierplane-head"
    # KubeRay adds the autoscaler's container to this pod; only that container talks to Kubernetes.
    pod["spec"]["automountServiceAccountToken"] = overlay.autoscale
    container = pod["spec"]["containers"][0]
    container["ports"] = [
        _port("gcs-server", 6379),
        _port("dashboard", DASHBOARD_PORT),
        _port("client", 10001),
        _port("metrics", METRICS_PORT),
    ]
    container["readinessProbe"] = _probe("/api/gcs_healthz", DASHBOARD_PORT, failures=6)
    return pod


def gateway_pod(config: PlaneConfig, overlay: Overlay, serve_port: int) -> Manifest:
    """The pod of one gateway replica: ready when it can serve, and drained before it stops. ``serve_port`` is
    that of Serve's ingress."""
    port = config.gateway.port
    cpus = max(1, round(config.gateway.cpus))
    resources = {"cpu": str(cpus), "memory": "2Gi", "ephemeral-storage": "2Gi"}
    grace_s = GATEWAY_DRAIN_S + MARGIN_S
    pod = _pod("gateway", overlay, "ray-worker", resources, _env(config), grace_s=grace_s)
    container = pod["spec"]["containers"][0]
    container["ports"] = [
        _port("http", port), _port("serve", serve_port), _port("metrics", METRICS_PORT),
    ]  # fmt: skip
    container["readinessProbe"] = _probe("/health/ready", port, failures=2)
    # Kubernetes sends no new requests once the pod is deleted; requests in flight have this long to finish.
    container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(GATEWAY_DRAIN_S)]}}}
    pod["spec"]["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels("gateway")},
        }
    ]
    return pod


def tier_pod(
    config: PlaneConfig, tier: TierConfig, need: PodNeed, overlay: Overlay, serve_port: int
) -> Manifest:
    """The pod of one tier's engines on the GPUs of one node, or on CPUs."""
    memory = mebibytes(need.memory_bytes)
    resources = {"cpu": str(need.cpus), "memory": memory, "ephemeral-storage": "16Gi"}
    if need.gpus:
        resources["nvidia.com/gpu"] = str(need.gpus)
    drain_s = round(tier.drain_timeout_s) + ENGINE_STOP_S
    env = [*_env(config), _secret_env("HF_TOKEN", "tierplane-hub", "token")]
    pod = _pod("tier", overlay, "ray-worker", resources, env, grace_s=drain_s + MARGIN_S)
    pod["metadata"]["labels"]["tierplane.io/tier"] = group_name(tier.name)
    pod["metadata"]["annotations"] = {"tierplane.io/memory-source": need.source}
    container = pod["spec"]["containers"][0]
    container["ports"] = [_port("serve", serve_port), _port("metrics", METRICS_PORT)]
    # Serve starts a proxy on this node once a replica runs on it.
    container["readinessProbe"] = _probe("/-/healthz", serve_port, failures=2)
    container["lifecycle"] = {"preStop": {"exec": {"command": ["sh", "-c", _drain(drain_s)]}}}
    if need.shared_bytes:
        _shared_memory(pod, need.shared_bytes)
    if need.gpus and overlay.gpu:
        pod["spec"] |= _on_gpus(gpu_named(overlay.gpu).nvml_name)
    return pod


def group_name(name: str) -> str:
    """A tier's name in the form that Kubernetes accepts."""
    return name.replace("_", "-")


def labels(component: str) -> dict[str, str]:
    """The labels that the network policies, services and disruption budgets in ``k8s/base`` select."""
    return {"app.kubernetes.io/name": "tierplane", "app.kubernetes.io/component": component}


def start_params(cpus: int, resources: Mapping[str, int]) -> dict[str, str]:
    """``rayStartParams`` of a worker group: fixed ports, and the resources that Ray may use."""
    params = {**RAY_PORTS, "num-cpus": str(cpus)}
    if resources:
        # Encoded twice: KubeRay writes it into a shell command.
        params["resources"] = json.dumps(json.dumps(resources))
    return params


def _pod(
    component: str,
    overlay: Overlay,
    container: str,
    resources: Mapping[str, str],
    env: Sequence[Manifest],
    *,
    grace_s: int,
) -> Manifest:
    return {
        "metadata": {"labels": labels(component)},
        "spec": {
            "automountServiceAccountToken": False,
            "serviceAccountName": "tierplane",
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": grace_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": container,
                    "image": f"{IMAGE}:{overlay.tag}",
                    "imagePullPolicy": "IfNotPresent",
                    "env": list(env),
                    # Memory is not overcommitted: an engine that outgrows its request would harm the node.
                    "resources": {
                        "requests": dict(resources),
                        "limits": {k: v for k, v in resources.items() if k != "cpu"},
                    },
                    "securityContext": container_security(),
                    "livenessProbe": _probe("/api/local_raylet_healthz", AGENT_PORT, failures=12),
                    "volumeMounts": [
                        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
                        {"name": "home", "mountPath": "/home/tierplane"},
                        {"name": "models", "mountPath": "/models"},
                    ],
                }
            ],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "home", "emptyDir": {}},
                {"name": "models", "persistentVolumeClaim": {"claimName": "tierplane-models"}},
            ],
        },
    }


def _env(config: PlaneConfig) -> list[Manifest]:
    env: list[Manifest] = [{"name": name, "value": value} for name, value in _ENV.items()]
    keys = {tier.api_key_env for tier in config.tiers}
    # The controller may run in any pod.
    keys |= {webhook.secret_env for webhook in config.controller.alerts.webhooks}
    names = sorted(filter(None, keys))
    return env + [_secret_env(name, "tierplane-keys", name, optional=False) for name in names]


def _secret_env(name: str, secret: str, key: str, *, optional: bool = True) -> Manifest:
    reference: Manifest = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _port(name: str, number: int) -> Manifest:
    return {"name": name, "containerPort": number}


def _probe(path: str, port: int, *, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": 10,
        "periodSeconds": 5,
        "timeoutSeconds": 4,
        "failureThreshold": failures,
    }


def _drain(seconds: int) -> str:
    """A shell command that has Ray drain this node, so that Serve replaces its replicas, and waits until the
    engines have stopped."""
    return (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod ends' "
        f"--deadline-remaining-seconds {seconds}; "
        # The brackets keep the pattern from matching this command line itself.
        f"for i in $(seq {seconds}); do grep -qsa '[v]llm.entrypoints' /proc/[0-9]*/cmdline || exit 0; "
        "sleep 1; done"
    )


def _shared_memory(pod: Manifest, size_bytes: int) -> None:
    size = f"{size_bytes // GIB}Gi"
    pod["spec"]["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108


def _on_gpus(driver_name: str) -> Manifest:
    """Selects nodes with that GPU by the label of NVIDIA's GPU feature discovery, and tolerates their usual
    taint."""
    return {
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {
                                    "key": "nvidia.com/gpu.product",
                                    "operator": "In",
                                    "values": [driver_name.replace(" ", "-")],
                                }
                            ]
                        }
                    ]
                }
            }
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
