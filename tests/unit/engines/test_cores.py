from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controlplane.config import PlaneConfig, TierConfig
from controlplane.engines.base import Launch
from controlplane.engines.context import context_tokens
from controlplane.engines.cores import cores_for, usable_cores
from controlplane.engines.vllm import VllmEngine


def tier(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "engine": "llamacpp", "model": "/m.gguf", **settings}


def plane(*tiers: dict[str, Any], mode: str = "advise") -> PlaneConfig:
    return PlaneConfig.model_validate({"tiers": list(tiers), "controller": {"scaling": {"mode": mode}}})


@pytest.mark.parametrize(
    ("tiers", "cores", "nodes", "expected"),
    [
        pytest.param([tier("a"), tier("b"), tier("c")], 2, 1, [1, 1, 1], id="more engines than cores"),
        pytest.param([tier("a")], 8, 1, [8], id="alone"),
        pytest.param([tier("a", replicas=3), tier("b")], 8, 1, [2, 2], id="replicas count"),
        pytest.param([tier("a", replicas=3), tier("b")], 8, 2, [4, 4], id="spread over two machines"),
        pytest.param([tier("a", cpus=6), tier("b"), tier("c")], 8, 1, [6, 1, 1], id="reserved cores"),
        pytest.param([tier("a", cpus=16), tier("b")], 8, 1, [8, 1], id="more reserved than there are"),
        pytest.param(
            [tier("a"), {"name": "b", "engine": "simulated"}, tier("c", engine="vllm", model="org/m")],
            8,
            1,
            [8],
            id="only engines on CPUs count",
        ),
        pytest.param(
            [tier("a"), tier("b", engine="vllm", model="org/m", device="cpu")], 8, 1, [4, 4], id="vllm on cpu"
        ),
    ],
)
def test_engines_share_the_cores_of_their_machine(
    tiers: list[dict[str, Any]], cores: int, nodes: int, expected: list[int]
) -> None:
    config = plane(*tiers)
    shares = [cores_for(each, config, machine_cores=cores, nodes=nodes) for each in config.tiers]
    assert shares[: len(expected)] == expected


def test_a_scaled_tier_counts_with_all_the_replicas_that_it_may_have() -> None:
    scaled = tier("a", scaling={"min_replicas": 1, "max_replicas": 4})
    for mode, share in (("advise", 8), ("apply", 2)):
        config = plane(scaled, mode=mode)
        assert cores_for(config.tiers[0], config, machine_cores=8) == share


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("odd", 8), (None, 8)],
)
def test_cores_within_affinity_and_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_text(limit)
    assert usable_cores(file) == expected


def test_a_vllm_engine_that_shares_many_cores_is_not_bound_to_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("controlplane.engines.vllm.usable_cores", lambda: 32)
    config = TierConfig(name="a", model="org/m", device="cpu")
    alone = VllmEngine().command(config, Launch("127.0.0.1", 1, "", "org/m", cores=32)).env
    assert "VLLM_CPU_OMP_THREADS_BIND" not in alone
    shared = VllmEngine().command(config, Launch("127.0.0.1", 1, "", "org/m", cores=8)).env
    assert (shared["VLLM_CPU_OMP_THREADS_BIND"], shared["OMP_NUM_THREADS"]) == ("nobind", "7")
    own = TierConfig(name="a", model="org/m", device="cpu", env={"OMP_NUM_THREADS": "3"})
    env = VllmEngine().command(own, Launch("127.0.0.1", 1, "", "org/m", cores=8)).env
    assert env["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"engine_args": {"ctx-size": 8192, "parallel": 4}}, 2048),
        ({"engine_args": {"n-ctx": 8192, "n-parallel": 3}}, 2730),
        ({"engine_args": {"ctx-size": 8192}, "concurrency_limit": 2}, 4096),
        ({"engine_args": {"ctx-size": 8192, "parallel": 4, "kv-unified": True}}, 8192),
        ({"engine_args": {"parallel": 4}}, None),
        ({"engine": "simulated", "model": "x"}, 32_768),
        ({"engine": "vllm", "model": "org/m", "engine_args": {"max-model-len": 4096}}, 4096),
        ({"engine": "vllm", "model": "org/m"}, None),
    ],
)
def test_the_context_of_a_request_is_that_of_one_slot(settings: dict[str, Any], expected: int | None) -> None:
    assert context_tokens(TierConfig.model_validate(tier("a", **settings))) == expected
