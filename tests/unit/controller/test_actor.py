"""The parts of the controller's actor that need no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.config import ControllerConfig
from controlplane.controller import ray_cordons
from controlplane.controller.actor import controller_rules, store_path
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines.metrics_scraper import scrape_targets
from tests.support.endpoints import make_endpoint

ENDPOINT = make_endpoint(
    "small-1",
    tier="small",
    engine="vllm",
    secret="s3cret",
    generation=3,
    metrics_path="/metrics",
    metric_names=(("running", "vllm:num_requests_running"),),
)


def test_the_store_is_where_the_configuration_says(run_dir: Path) -> None:
    assert store_path(ControllerConfig()) == run_dir / "controller-tierplane.sqlite"
    assert store_path(ControllerConfig(namespace="second")) == run_dir / "controller-second.sqlite"
    assert store_path(ControllerConfig(store_path="/var/lib/plane.sqlite")) == Path("/var/lib/plane.sqlite")
    assert store_path(ControllerConfig(store_path=":memory:")) is None


def test_the_rules_are_those_of_the_configuration() -> None:
    rules = controller_rules(
        ControllerConfig(overheat_after_s=7.0, cordon_hold_s=8.0, hang_after_s=9.0, crash_limit=2)
    )
    assert (rules.gpus.hot_for_s, rules.gpus.hold_initial_s) == (7.0, 8.0)
    assert (rules.stalls.after_s, rules.reconcile.crash_limit) == (9.0, 2)


def test_engines_that_serve_and_have_metrics_are_read_with_their_secret() -> None:
    starting = replace(ENDPOINT, endpoint_id="small-2", state=EndpointState.STARTING)
    elsewhere = replace(ENDPOINT, endpoint_id="cloud-1", metrics_path="", metric_names=())
    [target] = scrape_targets([ENDPOINT, starting, elsewhere])
    assert (target.endpoint_id, target.generation, target.secret) == ("small-1", 3, "s3cret")
    assert target.url == "http://127.0.0.1:1/metrics"
    assert target.names == {"running": "vllm:num_requests_running"}
    assert "s3cret" not in repr(target)


class Ray:
    """Named actors, as far as cordons need them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: set[str] = set()
        self.created: list[tuple[str, str]] = []
        self.released: list[str] = []
        monkeypatch.setattr(ray_cordons, "held_gpus", lambda namespace: set(self.held))
        monkeypatch.setattr(ray_cordons, "_hold", self.hold)
        monkeypatch.setattr(ray_cordons, "_release", self.release)

    def hold(self, uuid: str, node_id: str, namespace: str) -> None:
        self.held.add(uuid)
        self.created.append((uuid, node_id))

    def release(self, uuid: str, namespace: str) -> None:
        self.held.discard(uuid)
        self.released.append(uuid)


@pytest.mark.parametrize(
    ("wanted", "gpus", "held"),
    [
        ({"g1": "n1", "g2": "n2"}, {"n1": 8, "n2": 8}, {"g1", "g2"}),
        ({"g1": "n1", "g2": "n1", "g3": "n1"}, {"n1": 2}, {"g1", "g2"}),
        ({"g1": "n1", "g2": "gone"}, {"n1": 8}, {"g1"}),
        ({"g1": "n1"}, {"n1": 0}, set()),
    ],
)
def test_gpus_out_of_use_are_held_up_to_the_number_that_ray_counts(
    monkeypatch: pytest.MonkeyPatch, wanted: Mapping[str, str], gpus: Mapping[str, int], held: set[str]
) -> None:
    ray = Ray(monkeypatch)
    ray_cordons.hold_gpus("tierplane", wanted, gpus)
    assert ray.held == held
    ray_cordons.hold_gpus("tierplane", wanted, gpus)
    assert ray.held == held
    assert (len(ray.created), ray.released) == (len(held), []), "the same once more changes nothing"


def test_a_returned_gpu_is_released_and_gpus_held_by_a_lost_controller_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray(monkeypatch)
    ray.held = {"g1", "g2"}
    ray_cordons.hold_gpus("tierplane", {"g2": "n1"}, {"n1": 8})
    assert (ray.held, ray.created, ray.released) == ({"g2"}, [], ["g1"])
    ray_cordons.release_all_gpus("tierplane")
    assert (ray.held, ray.released) == (set(), ["g1", "g2"])
