"""The metrics of several gateways in one exposition."""

from __future__ import annotations

from controlplane.gateway.request_context import RequestContext
from controlplane.gateway.telemetry.metrics import Metrics, merge_expositions
from controlplane.http.messages import Request


def test_expositions_of_several_gateways_become_one() -> None:
    text = (
        '# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n# HELP b B.\n# TYPE b gauge\nb{t="x"} 2.0\n'
    )
    merged = merge_expositions([("g1", text), ("g2", text)])
    assert merged.count("# TYPE a_total counter") == 1
    lines = merged.splitlines()
    assert lines[2:4] == ['a_total{gateway="g1"} 1.0', 'a_total{gateway="g2"} 1.0']
    assert 'b{gateway="g2",t="x"} 2.0' in lines


def test_counters_are_up_to_date_whenever_the_registry_is_read() -> None:
    metrics = Metrics()
    name = "tierplane_tokens_total"
    for prompt, generated in ((3, 4), (5, 0)):
        context = RequestContext(Request("POST", "/v1/chat/completions", "", {}, b"{}"), "id", 0.0, 10.0)
        metrics.used(context, "balanced", prompt, generated, None)
    for _ in range(2):
        found = {
            kind: metrics.registry.get_sample_value(name, {"tier": "balanced", "kind": kind})
            for kind in ("prompt", "generated")
        }
        assert found == {"prompt": 8.0, "generated": 4.0}
    assert 'tierplane_tokens_total{kind="prompt",tier="balanced"} 8.0' in metrics.text()
