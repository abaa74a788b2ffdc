"""``controller.alerts``: every mistake at once, with its remedy."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.config import parse_plane
from controlplane.core.alerts.alert import Severity
from controlplane.core.alerts.rules import RuleChange
from controlplane.errors import ConfigError, Problem
from controlplane.kubernetes.overlays import OVERLAYS
from controlplane.kubernetes.pods import gateway_pod, head_pod


def plane(alerts: dict[str, Any]) -> Any:
    tiers = [{"name": "small", "engine": "simulated"}]
    return parse_plane({"tiers": tiers, "controller": {"alerts": alerts}})


def problems(alerts: dict[str, Any]) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        plane(alerts)
    return {problem.path.removeprefix("controller.alerts."): problem for problem in caught.value.problems}


def test_changes_reach_the_rules() -> None:
    rules = {
        "TierplaneQueueLong": {"threshold": 20, "for_s": 0, "severity": "critical"},
        "TierplaneGpuHot": {},
    }
    config = plane({"rules": rules, "webhooks": [{"url": "https://hooks.example/x"}]}).controller.alerts
    assert config.changes() == {
        "TierplaneQueueLong": RuleChange(True, 20.0, 0.0, Severity.CRITICAL),
        "TierplaneGpuHot": RuleChange(),
    }
    [webhook] = config.webhooks
    assert (webhook.secret_env, webhook.min_severity) == (None, "warning")


def test_all_mistakes_are_reported_at_once() -> None:
    found = problems(
        {
            "interval_s": 0,
            "webhooks": [
                {"url": "ftp://x"},
                {"url": "https://x/y", "secret_env": "1X", "min_severity": "bad"},
            ],
            "rules": {
                "TierplaneTierDwon": {},
                "TierDown": {},
                "TierplaneBreakerOpen": {"enabled": False},
                "TierplaneTierHeld": {"threshold": 2},
                "TierplaneSheds": {"threshold": 1},
                "TierplaneGpuHot": {"threshold": -3, "for": 3},
            },
        }
    )
    assert set(found) >= {
        "interval_s",
        "webhooks[0].url",
        "webhooks[1].secret_env",
        "webhooks[1].min_severity",
        "rules.TierplaneGpuHot.for",
    }
    assert found["webhooks[0].url"].message == "must be an http:// or https:// address"
    assert "name of an environment variable" in found["webhooks[1].secret_env"].message
    found = problems(
        {
            "webhooks": [{"url": "https://x/y"}, {"url": "https://x/y"}],
            "rules": {
                "TierplaneTierDwon": {},
                "TierDown": {},
                "TierplaneBreakerOpen": {"enabled": False},
                "TierplaneTierHeld": {"threshold": 2},
                "TierplaneSheds": {"threshold": 1},
                "TierplaneGpuHot": {"threshold": -3},
            },
        }
    )
    assert set(found) == {
        "webhooks[1].url",
        "rules.TierplaneTierDwon",
        "rules.TierDown",
        "rules.TierplaneBreakerOpen",
        "rules.TierplaneTierHeld.threshold",
        "rules.TierplaneSheds.threshold",
        "rules.TierplaneGpuHot.threshold",
    }
    assert "known: TierplaneTierDown, " in found["rules.TierplaneTierDwon"].remedy
    assert "TierplaneBreakerOpen" not in found["rules.TierplaneTierDwon"].remedy
    assert found["rules.TierDown"].remedy == "did you mean 'TierplaneTierDown'?"
    assert "Prometheus" in found["rules.TierplaneBreakerOpen"].message


def test_on_kubernetes_every_pod_gets_the_webhooks_secrets() -> None:
    config = plane({"webhooks": [{"url": "https://x/y", "secret_env": "HOOK"}]})
    for pod in (head_pod(config, OVERLAYS["dev-cpu"]), gateway_pod(config, OVERLAYS["dev-cpu"], 8000)):
        [container] = pod["spec"]["containers"]
        [found] = [each for each in container["env"] if each["name"] == "HOOK"]
        assert found["valueFrom"]["secretKeyRef"] == {"name": "tierplane-keys", "key": "HOOK"}
