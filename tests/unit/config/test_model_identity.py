"""Two tiers serve the same model only if it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controlplane.config import PlaneConfig, TierConfig, parse_plane
from controlplane.core.routing.tier_table import RouteRefusal, RouteRequest, resolve, resume_route
from controlplane.errors import ConfigError


def plane(*tiers: dict[str, Any]) -> PlaneConfig:
    return PlaneConfig(tiers=[TierConfig(**{"engine": "simulated", **tier}) for tier in tiers])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"model": "orga/Llama"}, {"model": "orgb/Llama"}),
        ({"model": "/models/qwen/final"}, {"model": "/models/llama/final"}),
        ({"model": "/models/qwen/final"}, {"model": "/models/llama/final/"}),
        ({"model": "./a/m.gguf"}, {"model": "./b/m.gguf"}),
        ({"model": "orga/Llama"}, {"model": "/models/Llama"}),
        ({"model": "orga/Llama:Q4_K_M"}, {"model": "orga/Llama:Q8_0"}),
        ({"model": "orga/Llama"}, {"model": "ORGA/Llama"}),
        ({"model": "orga/Llama", "engine": "vllm"},
         {"model": "orga/Llama", "engine": "vllm", "engine_args": {"revision": "v2"}}),
        ({"model": "orga/Llama", "engine": "vllm"},
         {"model": "orga/Llama", "engine": "vllm", "engine_args": {"quantization": "fp8"}}),
        ({"model": "orga/Llama", "engine": "vllm", "engine_args": {"lora_modules": "x=/a"}},
         {"model": "orga/Llama", "engine": "vllm", "engine_args": {"lora-modules": "x=/b"}}),
        ({"model": "orga/X", "served_model_name": "chat"}, {"model": "orga/Y", "served_model_name": "chat"}),
        ({"model": "orga/X", "served_model_name": "Y"}, {"model": "orga/Y"}),
    ],
)  # fmt: skip
def test_different_models_are_never_mixed(a: dict[str, Any], b: dict[str, Any]) -> None:
    config = plane({"name": "a", "spill": "none", **a}, {"name": "b", "spill": "none", **b})
    table = config.route_table()
    assert resume_route(table, 0).order == (0,)
    assert resume_route(table, 1).order == (1,)
    shared = {config.tiers[0].model_id} & {config.tiers[1].model_id}
    for name in shared:
        for request in (RouteRequest(model=name), RouteRequest(models=("a", name))):
            route = resolve(request, table)
            assert route.refusal is RouteRefusal.UNKNOWN_MODEL
            assert "tier a" in route.message
            assert "tier b" in route.message
    assert not shared & table.listed_models().keys()


def test_the_whole_name_is_always_understood() -> None:
    table = plane({"name": "a", "model": "orga/Llama"}, {"name": "b", "model": "orgb/Llama"}).route_table()
    assert resolve(RouteRequest(model="orgb/Llama"), table).order == (1,)
    refused = resolve(RouteRequest(model="Llama"), table)
    assert "orga/Llama (tier a), orgb/Llama (tier b)" in refused.message
    assert list(table.listed_models()) == ["orga/Llama", "orgb/Llama"]


def test_paths_are_not_shown_to_clients() -> None:
    models = ("/srv/secret/qwen/final", "/srv/secret/llama/final")
    table = plane(
        *({"name": name, "model": model} for name, model in zip("ab", models, strict=True))
    ).route_table()
    message = resolve(RouteRequest(model="final"), table).message
    assert "qwen/final (tier a), llama/final (tier b)" in message
    assert "/srv" not in message
    assert table.listed_models() == {}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"model": "orga/Llama"}, {"model": "orga/Llama", "concurrency_limit": 3}),
        ({"model": "/models/m"}, {"model": "/models/x/../m/"}),
        ({"model": "orga/Llama", "engine": "vllm"},
         {"model": "orga/Llama", "engine": "vllm", "engine_args": {"max-model-len": 4096, "revision": None}}),
        ({"model": "o/Llama", "served_model_name": "x"}, {"model": "o/Llama", "served_model_name": "y"}),
    ],
)  # fmt: skip
def test_the_same_model_in_two_tiers(a: dict[str, Any], b: dict[str, Any]) -> None:
    table = plane({"name": "a", **a}, {"name": "b", **b}).route_table()
    assert resume_route(table, 0).order == (0, 1)
    assert table.ambiguous == {}


def test_a_link_to_a_folder_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    tiers = [{"name": "a", "model": str(tmp_path / "model")}, {"name": "b", "model": str(tmp_path / "link")}]
    assert resume_route(plane(*tiers).route_table(), 0).order == (0, 1)


@pytest.mark.parametrize("name", ["auto", "gateway", "controller"])
def test_reserved_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' can't be a tier's name"):
        parse_plane({"tiers": [{"name": name, "engine": "simulated"}]})
    with pytest.raises(ConfigError, match=f"'{name}' can't be a model's name"):
        parse_plane({"tiers": [{"name": "a", "engine": "simulated", "served_model_name": name}]})
