"""The metrics of several gateways in one exposition."""

from __future__ import annotations

from controlplane.gateway.telemetry.metrics import merge_expositions


def test_expositions_of_several_gateways_become_one() -> None:
    text = (
        '# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n# HELP b B.\n# TYPE b gauge\nb{t="x"} 2.0\n'
    )
    merged = merge_expositions([("g1", text), ("g2", text)])
    assert merged.count("# TYPE a_total counter") == 1
    lines = merged.splitlines()
    assert lines[2:4] == ['a_total{gateway="g1"} 1.0', 'a_total{gateway="g2"} 1.0']
    assert 'b{gateway="g2",t="x"} 2.0' in lines
