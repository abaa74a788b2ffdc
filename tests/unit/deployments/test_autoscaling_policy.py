"""The policy that Serve's autoscaler calls, without Ray."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import RayError

from controlplane.config import TierConfig
from controlplane.config.scaling import ScalingConfig
from controlplane.controller import targets_client
from controlplane.controller.targets_client import Targets
from controlplane.core.reconcile.replica_targets import TierTarget
from deployments.autoscaling_policy import TargetPolicy, autoscaling
from tests.support.waiting import until


def context(*running: str, target: int = 2) -> Any:
    return SimpleNamespace(
        running_replicas=[SimpleNamespace(unique_id=each) for each in running], target_num_replicas=target
    )


class Controller:
    """The source from which the policy's thread fetches targets."""

    def __init__(self) -> None:
        self.targets: Mapping[str, TierTarget] = {}
        self.away = False
        self.fetched = 0
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self) -> Mapping[str, TierTarget]:
        assert self.gate.wait(10)
        self.fetched += 1
        if self.away:
            raise RayError("it is away")
        return self.targets


def target_threads() -> list[threading.Thread]:
    """The threads that fetch targets, without those of policies that no longer exist."""
    gc.collect()
    return [each for each in threading.enumerate() if each.name == "tierplane-targets"]


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    until(lambda: not target_threads())
    source = Controller()
    monkeypatch.setattr(targets_client, "_by_namespace", {"here": Targets(source.fetch, refresh_s=0.005)})
    return source


def test_the_configured_number_until_there_is_a_target_and_after_it_is_too_old(
    controller: Controller,
) -> None:
    policy = TargetPolicy("small", 2, "here")
    assert policy(context("a", "b")) == (2, {})
    controller.targets = {
        "small": TierTarget(3, "a moves", time.time() + 60),
        "other": TierTarget(9, "", time.time() + 60),
    }
    until(lambda: policy(context("a", "b"))[0] == 3)
    controller.targets = {"small": TierTarget(2, "a moved", time.time() + 60, ("small-a",))}
    until(lambda: policy(context("b", "c"))[0] == 2)
    assert policy(context("a", "b", "c"))[0] == 3, "one more for as long as Serve counts the one that leaves"
    controller.targets = {"small": TierTarget(3, "another moves", time.time() + 0.3)}
    until(lambda: policy(context("b", "c"))[0] == 3)
    controller.away = True
    until(lambda: policy(context("b", "c"))[0] == 2)


def test_until_the_first_target_a_tier_stays_as_it_is_for_a_while(controller: Controller) -> None:
    controller.away = True
    policy = TargetPolicy("small", 2, "here")
    until(lambda: controller.fetched > 2)
    assert policy(context("a", "b", target=3)) == (3, {}), "one of them moves"
    assert policy(context(target=0)) == (0, {}), "the tier is drained"
    controller.away = False
    until(lambda: policy(context("a", "b", target=3))[0] == 2)


def test_a_controller_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Controller()
    source.away = True
    targets = Targets(source.fetch, refresh_s=0.005, first_limit_s=0.05)
    monkeypatch.setattr(targets_client, "_by_namespace", {"here": targets})
    policy = TargetPolicy("small", 2, "here")
    until(lambda: policy(context("a", "b", target=3))[0] == 2)


def test_serves_loop_never_waits_for_the_controller(controller: Controller) -> None:
    controller.gate.clear()
    policy = TargetPolicy("small", 2, "here")
    began_s = time.monotonic()
    for _ in range(100):
        assert policy(context("a", "b")) == (2, {})
    assert time.monotonic() - began_s < 1.0
    controller.gate.set()


def test_one_thread_for_all_tiers_and_none_without_a_policy(controller: Controller) -> None:
    until(lambda: not target_threads())  # the threads of earlier tests end a moment after their policies
    policies = [TargetPolicy(name, 1, "here") for name in ("a", "b", "c")]
    assert len(target_threads()) == 1
    assert len(policies) == 3
    policies.clear()
    until(lambda: not target_threads())
    again = TargetPolicy("a", 1, "here")
    before = controller.fetched
    until(lambda: controller.fetched > before)
    assert again(context("x"))[0] == 1


@pytest.mark.parametrize(
    ("replicas", "scaling", "most"),
    [(0, None, 11), (1, None, 11), (14, None, 15), (1, ScalingConfig(max_replicas=3), 4)],
)
def test_serve_starts_the_configured_replicas_and_may_exceed_the_maximum_by_one(
    replicas: int, scaling: ScalingConfig | None, most: int
) -> None:
    tier = TierConfig(name="small", engine="simulated", replicas=replicas, scaling=scaling)
    settings = autoscaling(tier, "space")
    assert (settings.min_replicas, settings.initial_replicas, settings.max_replicas) == (
        0,
        replicas,
        most,
    )
    assert settings.upscale_delay_s == settings.downscale_delay_s == 0.0


def test_serve_can_copy_the_policy_into_its_checkpoints(controller: Controller) -> None:
    settings = autoscaling(TierConfig(name="small", engine="simulated", replicas=2), "here")
    policy: Any = settings.policy.get_policy()(**settings.policy.policy_kwargs)
    assert policy(context("a", "b")) == (2, {})
    dumps: Callable[[Any], bytes] = cloudpickle.dumps
    again = cloudpickle.loads(dumps(settings))
    assert again.policy.get_policy().__name__ == "TargetPolicy"
