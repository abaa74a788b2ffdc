"""What is kept of each look."""

from __future__ import annotations

from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.reports.history import points
from controlplane.core.telemetry.engine import EngineTelemetry
from controlplane.core.telemetry.samples import Absence, EngineSample, Missing
from tests.support.control import gpu_sample, node_sample


def endpoint(name: str, state: EndpointState) -> Endpoint:
    return Endpoint(name, "small", "m", "vllm", "", state, 10, generation=1)


def test_every_series_has_its_figure_and_what_is_missing_has_none() -> None:
    engine = EngineTelemetry()
    for at_s in (0.0, 4.0):
        engine.observe(
            EngineSample(
                *("small-1", 1, at_s, 0.01, ""),
                gauges=(("running", 3.0), ("kv_usage_ratio", 0.5)),
                counters=(("generation_tokens_total", 25.0 * at_s),),
            ),
            at_s,
        )
    fleet = GpuInventory()
    blind = gpu_sample("g1", 1, gpu_ratio=Missing(Absence.ERROR, "no"), power_w=Missing(Absence.ERROR, "no"))
    fleet.observe("n", [node_sample("n", 1, 4.0, [gpu_sample("g0"), blind])], [], now_s=4.0)
    gateway = GatewayInfo("g", "n", "", in_flight=4, queued=2, in_flight_by_endpoint=(("small-1", 4),))
    endpoints = [endpoint("small-1", EndpointState.READY), endpoint("small-2", EndpointState.STARTING)]
    assert points(endpoints, [gateway], {"small-1": engine}, fleet, 4.0) == {
        "gateways/in_flight": 4,
        "gateways/queued": 2,
        "tier/small/replicas": 2,
        "tier/small/serving": 1,
        "tier/small/in_flight": 4,
        "tier/small/running": 3.0,
        "tier/small/kv_usage_ratio": 0.5,
        "tier/small/tokens_per_s": 25.0,
        "gpus/healthy": 2,
        "gpus/gpu_ratio": 0.5,
        "gpus/power_w": 200.0,
    }
    later = points(endpoints, [], {"small-1": engine}, fleet, 60.0)
    assert "tier/small/tokens_per_s" not in later
    assert "gpus/gpu_ratio" not in later
    assert later["gpus/healthy"] == 2
