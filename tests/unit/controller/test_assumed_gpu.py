"""The speed that is first assumed for a tier's engines, from the GPUs that the cluster has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.config.scaling import ControllerScalingConfig
from controlplane.controller.scaling import PlaneScaler
from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.cluster.assumed_gpu import assumed_gpu
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.telemetry.samples import Absence, GpuInfo, Missing, Reading
from controlplane.planning.tier_specs import DEFAULT_SPEED, tier_specs
from tests.support.controller import HEARTBEAT_S, World
from tests.support.gateway import plane

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""In the table of well-known models: nothing is fetched."""


def spec_of(**tier: Any) -> TierSpec:
    values = {"name": "small", "engine": "vllm", "device": "gpu", "model": MODEL, **tier}
    made = TierConfig.model_validate(values)
    [spec] = tier_specs(plane().model_copy(update={"tiers": [made]}))
    return spec


def speeds(spec: TierSpec) -> dict[str, EngineSpeed]:
    assert spec.scaling is not None
    return dict(spec.scaling.gpu_priors)


def prior(spec: TierSpec) -> EngineSpeed:
    assert spec.scaling is not None
    return spec.scaling.rule.prior


def test_a_tier_that_may_run_anywhere_knows_its_speed_on_every_gpu_model() -> None:
    spec = spec_of()
    assert prior(spec) == DEFAULT_SPEED
    known = speeds(spec)
    assert len(known) > 10
    assert known["H100-80G"].step_s < known["L4"].step_s < DEFAULT_SPEED.step_s


def test_a_tier_that_names_gpu_models_begins_with_the_first() -> None:
    spec = spec_of(gpu_models=["A100-80G", "L4"])
    assert list(speeds(spec)) == ["A100-80G", "L4"]
    assert prior(spec) == speeds(spec)["A100-80G"]


@pytest.mark.parametrize(
    "tier",
    [
        {"model": "/no/such/folder"},
        {"engine": "llamacpp", "device": "cpu"},
        {"device": "cpu"},
        {"engine": "simulated", "device": "cpu"},
    ],
)
def test_for_others_no_speed_is_known(tier: dict[str, Any]) -> None:
    assert speeds(spec_of(**tier)) == {}


L4, H100, OTHER = "L4", "H100-80G", "Mystery 9000"


@pytest.mark.parametrize(
    ("before", "own", "there", "expected"),
    [
        ("", {}, {}, ""),
        ("", {}, {OTHER: 8, "": 2}, ""),
        ("", {}, {L4: 2, H100: 4}, H100),
        ("", {}, {L4: 4, H100: 4}, H100),
        ("", {L4: 1}, {L4: 1, H100: 8}, L4),
        # What was assumed stays while nothing speaks against it: what was learned would be forgotten.
        (L4, {}, {H100: 8}, L4),
        (L4, {L4: 1, H100: 8}, {H100: 8}, L4),
        (L4, {OTHER: 2}, {OTHER: 2}, L4),
        (L4, {H100: 1}, {L4: 8, H100: 1}, H100),
        ("gone from the table", {}, {L4: 1}, L4),
    ],
)
def test_which_gpu_is_assumed(before: str, own: dict[str, int], there: dict[str, int], expected: str) -> None:
    assert assumed_gpu(spec_of(), before, own, there) == expected


class Rig:
    """Two nodes, one with L4 GPUs and a larger one with H100 GPUs, with their drivers' names."""

    def __init__(self) -> None:
        nodes = {"l": ["l0", "l1"], "h": ["h0", "h1", "h2", "h3"]}
        self.world = World(nodes, {"small": 1})
        for node, uuids in nodes.items():
            name = "NVIDIA L4" if node == "l" else "NVIDIA H100 80GB HBM3"
            self.name(node, uuids, name)
        self.spec = spec_of()
        self.connect()

    def name(self, node: str, uuids: list[str], name: Reading[str]) -> None:
        self.world.samples[node] = {
            uuid: {"info": GpuInfo(uuid, i, name, numa_node=0, slowdown_c=90, nvlinks=())}
            for i, uuid in enumerate(uuids)
        }

    def connect(self) -> None:
        self.world.controller.declare([self.spec], HEARTBEAT_S)
        self.scaling = PlaneScaler(self.world.controller, ControllerScalingConfig())

    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.controller.gateway_report(GatewayInfo("g1", "l", ""))
            self.world.step()

    @property
    def assumed(self) -> EngineSpeed:
        """The speed that scaling assumes."""
        self.scaling.tick()
        return self.scaling._round.scaler("small").rule.prior


def test_scaling_begins_with_the_speed_of_the_gpus_that_are_there() -> None:
    rig = Rig()
    rig.world.silent = {"l", "h"}
    rig.step(12)
    assert rig.assumed == DEFAULT_SPEED, "no agent has reported"
    rig.world.silent = set()
    rig.spec = replace(rig.spec, replicas=0)
    rig.connect()
    rig.step(20)
    assert rig.assumed == speeds(rig.spec)["H100-80G"], "most are"
    reasons = [event.reason for event in rig.world.registry.events if event.kind == "speed assumed"]
    assert len(reasons) == 1
    assert "H100-80G" in reasons[0]
    rig.spec = replace(rig.spec, replicas=1)
    rig.connect()
    assert rig.assumed == speeds(rig.spec)["H100-80G"], "a gateway declares the configuration again"
    rig.step(20)
    [replica] = rig.world.replicas.values()
    assert replica.endpoint.node_id == "l"
    assert rig.assumed == speeds(rig.spec)["L4"], "its replica holds one"


def test_what_was_learned_stays_while_gpu_names_can_not_be_read() -> None:
    rig = Rig()
    rig.step(25)
    known = rig.assumed
    assert known == speeds(rig.spec)["L4"]
    scaler = rig.scaling._round.scaler("small")
    for node in ("l", "h"):
        uuids = rig.world.nodes[node]
        rig.name(node, uuids, Missing(Absence.ERROR, "the driver does not answer"))
    rig.step(25)
    assert rig.assumed == known
    assert rig.scaling._round.scaler("small") is scaler
