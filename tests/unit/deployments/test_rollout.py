"""Serve's settings for replacing replicas when a configuration changes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from controlplane.config import PlaneConfig, parse_plane

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, when it is imported
    from deployments.gateway import gateway_application
    from deployments.tier import tier_application


def plane(**tier: Any) -> PlaneConfig:
    return parse_plane({"tiers": [{"name": "a", "engine": "simulated", **tier}]})


def surge_percent(application: Any) -> int:
    return int(application._bound_deployment._deployment_config.max_surge_percent)


def test_a_new_gateway_starts_before_the_old_one_stops() -> None:
    assert surge_percent(gateway_application(plane())) == 100


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 8, 30])
@pytest.mark.parametrize("surge", [0, 1, 2, 3])
def test_a_rollout_starts_as_many_more_engines_as_configured(replicas: int, surge: int) -> None:
    config = plane(replicas=replicas, rollout_surge=surge)
    percent = surge_percent(tier_application(config, config.tiers[0]))
    assert (percent * replicas + 99) // 100 == min(surge, replicas)  # as Serve counts them (2.60)
