from __future__ import annotations

import os
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.engines import engine_for
from controlplane.engines.base import Launch
from controlplane.engines.supervision.environment import engine_environment

SECRETS = {
    "RAY_AUTH_TOKEN": "1", "RAY_AUTH_TOKEN_PATH": "2", "RAY_ADDRESS": "3", "HOOK_SECRET": "4",
    "OTHER_TIERS_KEY": "5", "AWS_SECRET_ACCESS_KEY": "6", "OPENAI_API_KEY": "7", "TIERPLANE_KEY": "8",
}  # fmt: skip
NEEDED = {
    "PATH": "/bin", "HOME": "/home/ada", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0", "CUDA_HOME": "/cuda",
    "NVIDIA_VISIBLE_DEVICES": "all", "NCCL_DEBUG": "INFO", "VLLM_LOGGING_LEVEL": "DEBUG", "HF_TOKEN": "hub",
    "HF_HOME": "/hub", "OMP_NUM_THREADS": "2", "LD_LIBRARY_PATH": "/lib", "PYTHONPATH": "/src",
    "https_proxy": "http://proxy", "SSL_CERT_FILE": "/cert", "TORCHINDUCTOR_CACHE_DIR": "/cache",
    "TIERPLANE_PLANE_ID": "p1",
}  # fmt: skip


def test_an_engine_gets_what_it_needs_and_no_secret_of_others() -> None:
    assert engine_environment({**NEEDED, **SECRETS}) == NEEDED


def test_a_tier_can_name_more() -> None:
    assert engine_environment(SECRETS, ["AWS_SECRET_ACCESS_KEY"]) == {"AWS_SECRET_ACCESS_KEY": "6"}


@pytest.mark.parametrize("kind", ["vllm", "llamacpp", "simulated"])
def test_every_engine_passes_what_its_tier_names(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1")
    settings: dict[str, Any] = {"name": "t", "model": "m", "engine": kind, "pass_env": ["AWS_PROFILE"]}
    tier = TierConfig(**settings)
    command = engine_for(tier).command(tier, Launch("127.0.0.1", 1, "secret", "m"))
    assert command.pass_env == ("AWS_PROFILE",)
    assert not any("secret" in word for word in command.argv)


def test_only_vllms_own_ray_workers_get_access_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1")
    tier = TierConfig(name="t", model="m", pipeline_parallel_size=2, pipeline_across_nodes=True)
    command = engine_for(tier).command(tier, Launch("127.0.0.1", 1, "secret", "m"))
    assert engine_environment(os.environ, command.pass_env)["RAY_AUTH_TOKEN"] == "1"
