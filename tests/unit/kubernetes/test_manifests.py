"""The manifests of every overlay: built by kustomize, valid by strict schemas, closed by network policies."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from controlplane.cli.k8s import HEADER, to_yaml
from controlplane.config import load_plane, parse_plane
from controlplane.errors import ConfigError
from controlplane.kubernetes import pods, rayservice
from controlplane.kubernetes.overlays import IMAGE, OVERLAYS
from controlplane.kubernetes.requests import pod_need
from controlplane.models.catalog import gpu_named
from tests.support.kubernetes_schemas import CUSTOM
from tests.support.repository import ROOT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own warnings at its import
    from ray.serve.schema import ServeDeploySchema

    from deployments import gateway as gateway_deployment
    from deployments import tier as tier_deployment

KUBECTL = Path(sys.executable).parent / "kubectl"
CONFIGS = {
    "dev-cpu": "configs/cpu.yaml",
    "production": "configs/production-low.yaml",
    "multi-node": "configs/production-enterprise.yaml",
}
KUBERNETES = "1.37"
Manifest = dict[str, Any]


@cache
def built(overlay: str) -> tuple[Manifest, ...]:
    done = subprocess.run(
        [KUBECTL, "kustomize", ROOT / "k8s" / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in built(overlay) if each["kind"] == kind}


def ray_service(overlay: str) -> Manifest:
    spec: Manifest = of_kind(overlay, "RayService")["tierplane"]["spec"]
    return spec


def groups(overlay: str) -> list[Manifest]:
    cluster = ray_service(overlay)["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates(overlay: str) -> Iterator[Manifest]:
    for group in groups(overlay):
        yield group["template"]
    for each in built(overlay):
        if each["kind"] in {"StatefulSet", "Deployment", "DaemonSet"}:
            yield each["spec"]["template"]


def component(template: Manifest) -> str:
    return str(template["metadata"]["labels"].get("app.kubernetes.io/component", ""))


every_overlay = pytest.mark.parametrize("overlay", CONFIGS)


def test_every_overlay_is_tested() -> None:
    assert {path.name for path in (ROOT / "k8s" / "overlays").iterdir()} == set(CONFIGS) == set(OVERLAYS)


@every_overlay
def test_every_manifest_is_valid_by_a_strict_schema(overlay: str) -> None:
    seen = set()
    for each in built(overlay):
        seen.add(each["kind"])
        if each["kind"] in CUSTOM:
            jsonschema.validate(each, CUSTOM[each["kind"]])
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    assert {"RayService", "NetworkPolicy", "PodDisruptionBudget", "Role", "Service"} <= seen


@every_overlay
def test_pod_templates_are_valid_pods(overlay: str) -> None:
    for template in pod_templates(overlay):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": "pod", **template["metadata"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_schemas_reject_unknown_fields() -> None:
    wrong = yaml.safe_load(yaml.safe_dump(of_kind("production", "RayService")["tierplane"]))
    wrong["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, CUSTOM["RayService"])


@every_overlay
def test_the_committed_rayservice_is_rendered_from_its_configuration(overlay: str) -> None:
    config = CONFIGS[overlay]
    manifest = rayservice.render(load_plane(ROOT / config), OVERLAYS[overlay])
    text = HEADER.format(config=config, overlay=overlay) + to_yaml(manifest)
    path = ROOT / "k8s" / "overlays" / overlay / "rayservice.yaml"
    assert path.read_text("utf-8") == text, (
        f"run: tierplane k8s render {config} --overlay {overlay} --output {path}"
    )
    assert of_kind(overlay, "RayService")["tierplane"]["spec"] == manifest["spec"]


def test_all_tiers_that_can_not_run_on_the_nodes_are_reported_at_once() -> None:
    file = load_plane(ROOT / CONFIGS["multi-node"])
    with pytest.raises(ConfigError) as caught:
        rayservice.render(file, OVERLAYS["production"])
    found = {problem.path: problem for problem in caught.value.problems}
    assert "one engine needs 8 GPUs" in found["tiers.capable.tensor_parallel_size"].message
    with pytest.raises(ConfigError) as caught:
        rayservice.render(file, OVERLAYS["dev-cpu"])
    assert [problem.path for problem in caught.value.problems] == [
        f"tiers.{name}.device" for name in ("lightweight", "balanced", "capable")
    ]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"gpu_models": ["H100-80G"]}, "gpu_models"),
        ({"pipeline_across_nodes": True}, "pipeline_across_nodes"),
    ],
)
def test_a_tier_for_other_nodes_is_refused(more: dict[str, Any], key: str) -> None:
    model = {"model": "Qwen/Qwen2.5-1.5B-Instruct", "pipeline_parallel_size": 2}
    tier = parse_plane({"tiers": [{"name": "a", **model, **more}]}).tiers[0]
    with pytest.raises(ConfigError) as caught:
        pod_need(tier, OVERLAYS["production"])
    assert [problem.path for problem in caught.value.problems] == [f"tiers.a.{key}"]


@every_overlay
def test_serve_accepts_the_configuration_and_it_equals_the_file(overlay: str) -> None:
    file = load_plane(ROOT / CONFIGS[overlay])
    values = yaml.safe_load(ray_service(overlay)["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(values)
    application = values["applications"][0]
    placed = {each.name: each.ray_actor_options for each in parsed.applications[0].deployments}
    assert not placed["gateway"].num_gpus
    assert {t.name: t.gpus for t in file.plane.tiers} == {
        name: options.num_gpus for name, options in placed.items() if name != "gateway"
    }
    del application["deployments"]
    ours = file.raw["applications"][0]
    assert application["args"]["gateway"].pop("host") == "0.0.0.0"
    assert application["args"]["gateway"] == {k: v for k, v in ours["args"]["gateway"].items() if k != "host"}
    assert {**application["args"], "gateway": 0} == {**ours["args"], "gateway": 0}
    assert {**application, "args": 0} == {**ours, "args": 0}
    assert values["http_options"]["host"] == "0.0.0.0"


@every_overlay
def test_every_deployment_fits_a_worker_group(overlay: str) -> None:
    file = load_plane(ROOT / CONFIGS[overlay])
    values = yaml.safe_load(ray_service(overlay)["serveConfigV2"])
    room: dict[str, int] = {}
    for group in groups(overlay)[1:]:
        resources = yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"]))
        for name, amount in resources.items():
            room[name] = amount * group["maxReplicas"]
            assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
    # A changed configuration starts as many gateways again, and up to rollout_surge engines of a tier.
    replicas = {t.name: t.replicas + t.rollout_surge for t in file.plane.tiers}
    replicas["gateway"] = 2 * file.plane.gateway.replicas
    for deployment in values["applications"][0]["deployments"]:
        (resource,) = deployment["ray_actor_options"]["resources"]
        assert room[resource] >= replicas[deployment["name"]]


@every_overlay
def test_tiers_are_on_the_gpus_they_were_planned_for(overlay: str) -> None:
    file, gpu = load_plane(ROOT / CONFIGS[overlay]), OVERLAYS[overlay].gpu
    for tier, group in zip(file.plane.tiers, groups(overlay)[2:], strict=True):
        spec = group["template"]["spec"]
        resources = spec["containers"][0]["resources"]
        assert resources["limits"].get("nvidia.com/gpu", "0") == str(round(tier.gpus))
        if gpu is None:
            assert "affinity" not in spec
            continue
        terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (match,) = terms["nodeSelectorTerms"][0]["matchExpressions"]
        assert match["values"] == [gpu_named(gpu).nvml_name.replace(" ", "-")]
        assert spec["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]


@every_overlay
def test_memory_is_requested_and_not_overcommitted(overlay: str) -> None:
    for template in pod_templates(overlay):
        for container in template["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["requests"])


@every_overlay
def test_no_container_has_privileges(overlay: str) -> None:
    for template in pod_templates(overlay):
        spec = template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["runAsGroup"] > 0
        assert security["fsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
        assert not [each for each in spec["volumes"] if "hostPath" in each]
        assert spec["enableServiceLinks"] is False
        contexts = [
            each["securityContext"] for each in [*spec["containers"], *spec.get("initContainers", [])]
        ]
        for context in contexts:
            assert context == pods.container_security()


@every_overlay
def test_only_the_heads_autoscaler_has_a_token_with_few_permissions(overlay: str) -> None:
    autoscales = ray_service(overlay)["rayClusterConfig"]["enableInTreeAutoscaling"]
    for template in pod_templates(overlay):
        head = component(template) == "head"
        assert template["spec"]["automountServiceAccountToken"] is (head and autoscales)
        assert template["spec"]["serviceAccountName"] == ("tierplane-head" if head else "tierplane")
    for account in of_kind(overlay, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    assert not of_kind(overlay, "ClusterRole")
    assert not of_kind(overlay, "ClusterRoleBinding")
    (role,) = of_kind(overlay, "Role").values()
    allowed = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert allowed == {
        ("pods", "get"),
        ("pods", "list"),
        ("pods", "watch"),
        ("rayclusters", "get"),
        ("rayclusters", "patch"),
    }
    (binding,) = of_kind(overlay, "RoleBinding").values()
    assert [each["name"] for each in binding["subjects"]] == ["tierplane-head"]
    if autoscales:
        options = ray_service(overlay)["rayClusterConfig"]["autoscalerOptions"]
        assert options["securityContext"] == pods.container_security()


@every_overlay
def test_the_namespace_enforces_the_restricted_standard(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"].get("namespace", "tierplane") for each in built(overlay)} == {"tierplane"}


@every_overlay
def test_secrets_are_referenced_and_never_written(overlay: str) -> None:
    assert not of_kind(overlay, "Secret")
    for template in pod_templates(overlay):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search(r"TOKEN|PASSWORD|SECRET|KEY$", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    cluster = ray_service(overlay)["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    if OVERLAYS[overlay].redis:
        password = cluster["gcsFaultToleranceOptions"]["redisPassword"]
        assert password["valueFrom"]["secretKeyRef"]["name"] == "tierplane-redis"


def policies(overlay: str, pod_labels: dict[str, str], direction: str) -> list[Manifest]:
    found = []
    for policy in of_kind(overlay, "NetworkPolicy").values():
        spec = policy["spec"]
        wanted = spec["podSelector"].get("matchLabels", {})
        if "matchExpressions" in spec["podSelector"] or direction not in spec["policyTypes"]:
            continue
        if wanted.items() <= pod_labels.items():
            found.append(spec)
    return found


def may_reach(overlay: str, to: str, port: int, source: dict[str, str], namespace: str = "tierplane") -> bool:
    """Whether the policies let a pod with labels ``source`` connect to ``port`` of a component's pod."""
    selecting = policies(overlay, pods.labels(to), "Ingress")
    assert selecting
    namespace_labels = {"kubernetes.io/metadata.name": namespace}
    if namespace == "agents":
        namespace_labels["tierplane.io/client"] = "true"
    for policy in selecting:
        for rule in policy.get("ingress", []):
            ports = rule.get("ports")
            if ports and not any(_allows(overlay, to, p, port) for p in ports):
                continue
            for peer in rule["from"]:
                wanted = peer.get("namespaceSelector", {}).get("matchLabels")
                in_namespace = (
                    namespace == "tierplane" if wanted is None else wanted.items() <= namespace_labels.items()
                )
                pod = peer.get("podSelector", {}).get("matchLabels", {})
                if in_namespace and pod.items() <= source.items():
                    return True
    return False


def _allows(overlay: str, to: str, allowed: Manifest, port: int) -> bool:
    """Whether a policy's port, a range or the name of a container's port, is ``port``."""
    first = allowed["port"]
    if isinstance(first, str):
        containers = [
            c for t in pod_templates(overlay) if component(t) == to for c in t["spec"]["containers"]
        ]
        return any(p["name"] == first and p["containerPort"] == port for c in containers for p in c["ports"])
    return bool(first <= port <= int(allowed.get("endPort") or first))


ENGINE_PORT = 40123
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


@every_overlay
@pytest.mark.parametrize(
    ("to", "port", "source", "namespace", "allowed"),
    [
        ("tier", ENGINE_PORT, pods.labels("gateway"), "tierplane", True),
        ("tier", ENGINE_PORT, pods.labels("tier"), "tierplane", False),
        ("tier", ENGINE_PORT, pods.labels("head"), "tierplane", False),
        ("tier", ENGINE_PORT, {}, "agents", False),
        ("tier", ENGINE_PORT, PROMETHEUS, "monitoring", False),
        ("tier", 12345, pods.labels("head"), "tierplane", True),
        ("tier", 12345, {"app": "other"}, "tierplane", False),
        ("tier", pods.METRICS_PORT, PROMETHEUS, "monitoring", True),
        ("tier", pods.METRICS_PORT, {}, "monitoring", False),
        ("tier", pods.METRICS_PORT, pods.labels("head"), "tierplane", False),
        ("gateway", 8080, {}, "agents", True),
        ("gateway", 8080, {}, "elsewhere", False),
        ("gateway", 8080, PROMETHEUS, "monitoring", True),
        ("gateway", pods.METRICS_PORT, {}, "agents", False),
        ("gateway", pods.METRICS_PORT, PROMETHEUS, "monitoring", True),
        ("head", 8265, {}, "agents", False),
        ("head", 8265, OPERATOR, "kuberay-system", True),
        ("head", 6379, {}, "elsewhere", False),
        ("head", 6379, pods.labels("tier"), "tierplane", True),
    ],
)
def test_the_network_policies_allow_only_these_connections(
    overlay: str, to: str, port: int, source: dict[str, str], namespace: str, allowed: bool
) -> None:
    assert may_reach(overlay, to, port, source, namespace) is allowed


@every_overlay
def test_connections_are_denied_by_default(overlay: str) -> None:
    deny = of_kind(overlay, "NetworkPolicy")["deny-all"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    egress = of_kind(overlay, "NetworkPolicy")["egress"]["spec"]["egress"]
    (outside,) = [rule for rule in egress if any("ipBlock" in peer for peer in rule["to"])]
    (block,) = [peer["ipBlock"] for peer in outside["to"]]
    closed = [ipaddress.ip_network(each) for each in block["except"]]
    inside = ["10.1.2.3", "172.20.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"]
    assert all(any(ipaddress.ip_address(each) in network for network in closed) for each in inside)
    assert not any(ipaddress.ip_address("8.8.8.8") in network for network in closed)
    assert [each["port"] for each in outside["ports"]] == [443]


@every_overlay
def test_only_the_head_may_connect_to_kubernetes(overlay: str) -> None:
    policy = of_kind(overlay, "NetworkPolicy")["egress-kubernetes"]["spec"]
    assert policy["podSelector"]["matchLabels"] == pods.labels("head")
    (rule,) = policy["egress"]
    assert [peer["ipBlock"]["except"] for peer in rule["to"]] == [["169.254.169.254/32"]]


def test_only_the_head_may_connect_to_redis() -> None:
    policy = of_kind("production", "NetworkPolicy")["redis"]["spec"]
    sources = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert sources == [pods.labels("head"), {"ray.io/node-type": "redis-cleanup"}]
    (claim,) = of_kind("production", "StatefulSet")["tierplane-redis"]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


@every_overlay
def test_a_pod_has_time_to_drain_before_it_is_killed(overlay: str) -> None:
    file = load_plane(ROOT / CONFIGS[overlay])
    assert pods.GATEWAY_DRAIN_S >= gateway_deployment.DRAIN_S
    assert pods.ENGINE_STOP_S >= tier_deployment.ENGINE_STOP_S
    longest_s = 0.0
    for template in (group["template"] for group in groups(overlay)[1:]):
        spec = template["spec"]
        if component(template) == "gateway":
            needed_s = gateway_deployment.DRAIN_S
        else:
            name = template["metadata"]["labels"]["tierplane.io/tier"]
            needed_s = file.plane.tier(name).drain_timeout_s + tier_deployment.ENGINE_STOP_S
        assert spec["terminationGracePeriodSeconds"] > needed_s
        assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        longest_s = max(longest_s, needed_s)
    service = ray_service(overlay)
    assert service["rayClusterDeletionDelaySeconds"] > longest_s
    assert service["upgradeStrategy"] == {"type": "NewCluster"}


@every_overlay
def test_every_container_is_probed(overlay: str) -> None:
    for template in pod_templates(overlay):
        for container in template["spec"]["containers"]:
            assert "livenessProbe" in container
            assert "readinessProbe" in container
    gateway_port = load_plane(ROOT / CONFIGS[overlay]).plane.gateway.port
    gateway = groups(overlay)[1]["template"]["spec"]["containers"][0]
    assert gateway["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": gateway_port}
    assert {"name": "http", "containerPort": gateway_port} in gateway["ports"]


@every_overlay
def test_budgets_and_the_service_select_pods_that_exist(overlay: str) -> None:
    templates = [template["metadata"]["labels"] for template in pod_templates(overlay)]
    budgets = of_kind(overlay, "PodDisruptionBudget")
    assert {"tierplane-gateway", "tierplane-tier"} <= set(budgets)
    selectors = [each["spec"]["selector"]["matchLabels"] for each in budgets.values()]
    selectors += [each["spec"]["selector"] for each in of_kind(overlay, "Service").values()]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in templates)
    claims = set(of_kind(overlay, "PersistentVolumeClaim"))
    for template in pod_templates(overlay):
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


@every_overlay
def test_images_are_pinned_and_an_overlay_can_use_another_registry(overlay: str) -> None:
    images = [c["image"] for template in pod_templates(overlay) for c in template["spec"]["containers"]]
    assert all(re.search(r":\d+\.\d+\.\d+(-\w+)?$", image) for image in images)
    tags = {image.rpartition(":")[2] for image in images if image.startswith(IMAGE)}
    assert tags == {OVERLAYS[overlay].tag}
    folder = ROOT / "k8s" / "overlays" / overlay
    fields = yaml.safe_load((folder / "image-fields.yaml").read_text())["images"]
    assert {each["path"].split("/")[2] for each in fields} == {"headGroupSpec", "workerGroupSpecs[]"}


def test_the_ray_version_is_the_locked_one() -> None:
    locked = re.search(r"^ray==(\S+)$", (ROOT / ".locks" / "core.txt").read_text(), re.MULTILINE)
    assert locked is not None
    assert locked[1] == rayservice.RAY_VERSION


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_images_install_the_locked_packages_and_run_as_an_ordinary_user(kind: str) -> None:
    text = (ROOT / "k8s" / "docker" / f"Dockerfile.{kind}").read_text("utf-8")
    user = re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert user == [(str(pods.USER_ID), str(pods.USER_ID))]
    assert f"--uid {pods.USER_ID}" in text
    assert all(re.search(r":\d+\.\d+\.\d+-\S+$", image) for image in re.findall(r"^FROM (\S+)", text, re.M))
    for lock in re.findall(r"-r (\.locks/\S+)", text):
        assert (ROOT / lock).is_file()
    for sources in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    installs = re.findall(r"pip install .*", text)
    assert installs
    assert all("--no-deps" in each for each in installs)


def test_the_pods_of_a_tier_that_scales_stay_within_its_bounds(tmp_path: Path) -> None:
    """KubeRay's autoscaler has the same bounds as the tier's own scaling."""
    values = yaml.safe_load((ROOT / CONFIGS["production"]).read_text())
    tier = values["applications"][0]["args"]["tiers"][0]
    tier |= {"replicas": 2, "scaling": {"min_replicas": 0, "max_replicas": 6}}
    path = tmp_path / "plane.yaml"
    path.write_text(yaml.safe_dump(values))
    spec = rayservice.render(load_plane(path), OVERLAYS["production"])["spec"]["rayClusterConfig"]
    (group,) = [each for each in spec["workerGroupSpecs"] if each["groupName"] == f"tier-{tier['name']}"]
    (room,) = yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"])).values()
    assert group["minReplicas"] == 0
    assert group["replicas"] * room >= 2
    assert group["maxReplicas"] * room >= 6


@pytest.mark.parametrize(
    ("given", "scales", "autoscale", "gpus"),
    [
        (None, True, True, 9.0),
        (None, False, True, None),
        (None, True, False, None),
        (5, True, True, 5),
    ],
)
def test_tiers_share_the_gpus_that_pods_can_be_added_for(
    tmp_path: Path, given: int | None, scales: bool, autoscale: bool, gpus: float | None
) -> None:
    """If the GPUs of existing pods were the limit, no pod would ever be added."""
    values = yaml.safe_load((ROOT / CONFIGS["production"]).read_text())
    args = values["applications"][0]["args"]
    args["tiers"][0] |= {
        "replicas": 2,
        **({"scaling": {"min_replicas": 0, "max_replicas": 6}} if scales else {}),
    }
    args["controller"] = {"scaling": {"mode": "apply", **({"gpus": given} if given else {})}}
    path = tmp_path / "plane.yaml"
    path.write_text(yaml.safe_dump(values))
    overlay = replace(OVERLAYS["production"], autoscale=autoscale)
    text = rayservice.render(load_plane(path), overlay)["spec"]["serveConfigV2"]
    written = yaml.safe_load(text)["applications"][0]["args"]["controller"]["scaling"]
    assert written["mode"] == "apply"
    assert written.get("gpus") == gpus


def test_the_ports_of_the_configuration_are_rendered(tmp_path: Path) -> None:
    file = yaml.safe_load((ROOT / CONFIGS["production"]).read_text("utf-8"))
    file["http_options"]["port"] = 9123
    file["applications"][0]["args"]["gateway"] = {"port": 9124}
    (tmp_path / "plane.yaml").write_text(yaml.safe_dump(file), "utf-8")
    manifest = rayservice.render(load_plane(tmp_path / "plane.yaml"), OVERLAYS["production"])
    found: dict[str, set[int]] = {}
    for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        for port in container["ports"]:
            found.setdefault(port["name"], set()).add(port["containerPort"])
        found.setdefault("probe", set()).add(container["readinessProbe"]["httpGet"]["port"])
    assert (found["serve"], found["http"], found["probe"]) == ({9123}, {9124}, {9123, 9124})


def test_a_guess_refuses_nothing(tmp_path: Path) -> None:
    model = {
        "model_type": "not_yet_known",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 128000,
    }
    (tmp_path / "config.json").write_text(json.dumps(model), "utf-8")
    file = yaml.safe_load((ROOT / CONFIGS["production"]).read_text("utf-8"))
    file["applications"][0]["args"]["tiers"] = [{"name": "odd", "model": str(tmp_path)}]
    (tmp_path / "plane.yaml").write_text(yaml.safe_dump(file), "utf-8")
    manifest = rayservice.render(load_plane(tmp_path / "plane.yaml"), OVERLAYS["production"])
    notes = [
        group["template"]["metadata"].get("annotations", {}).get("tierplane.io/memory-source", "")
        for group in manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    ]
    assert any("may not fit" in note and "'not_yet_known'" in note for note in notes)
