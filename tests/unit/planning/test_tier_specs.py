from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from controlplane.core.cluster.tier_spec import ScalingPlan
from controlplane.core.recommendations.rules import LATENCY_MS
from controlplane.planning.tier_specs import tier_specs
from tests.support.gateway import plane


def plan(**tier: Any) -> ScalingPlan:
    config = plane({"name": "small", **tier})
    [spec] = tier_specs(pickle.loads(pickle.dumps(config)))  # as Serve hands it to its replicas
    assert spec.plan is not None
    return spec.plan


@pytest.mark.parametrize(
    ("tier", "limit_ms"),
    [
        ({}, LATENCY_MS),
        ({"slo": {"total_s": 8.0}}, 8000.0),
        ({"slo": {"total_s": 8.0, "attainment": 0.9}}, math.inf),
        ({"slo": {"ttft_s": 0.5}}, math.inf),
    ],
)
def test_a_tier_is_slow_by_its_configured_slo(tier: dict[str, Any], limit_ms: float) -> None:
    assert plan(**tier).latency_limit_ms == limit_ms


def test_scaling_and_recommendations_use_the_configured_attainment() -> None:
    slo = {"ttft_s": 0.5, "itl_s": 0.04, "attainment": 0.95}
    rule = plan(slo=slo, scaling={"min_replicas": 1, "max_replicas": 4}).rule
    assert (rule.slo.ttft_s, rule.slo.itl_s, rule.slo.attainment) == (0.5, 0.04, 0.95)
    assert (rule.min_replicas, rule.max_replicas) == (1, 4)
