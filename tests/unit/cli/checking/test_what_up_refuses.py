"""What the plane would refuse when it starts, `tierplane validate` refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from controlplane.cli.checking.configuration import load_checked
from controlplane.config import TierConfig
from controlplane.errors import ConfigError, Problem, SetupError
from controlplane.planning.launch_check import launchable_model

SIMULATED: dict[str, Any] = {"name": "a", "engine": "simulated"}


def problems(tmp_path: Path, *tiers: Any, here: bool = True, **rest: Any) -> dict[str, str]:
    application = {"import_path": "deployments.app:build", "args": {"tiers": tiers or [SIMULATED]}}
    application |= rest.pop("application", {})
    path = tmp_path / "plane.yaml"
    path.write_text(json.dumps({"applications": [application], **rest}))
    found: tuple[Problem, ...] = ()
    try:
        load_checked(str(path), here=here)
    except ConfigError as error:
        found = error.problems
    assert not any("sk-secret" in str(problem) for problem in found)
    assert all(problem.line for problem in found)
    short = "applications[0].args.tiers[0]."
    return {each.path.removeprefix(short): f"{each.message} ({each.remedy})" for each in found}


def llamacpp(model: Path | str, **engine_args: Any) -> dict[str, Any]:
    args = {name.replace("_", "-"): value for name, value in engine_args.items()}
    return {"name": "a", "engine": "llamacpp", "model": str(model), "engine_args": args}


@pytest.mark.parametrize(
    ("rest", "path"),
    [
        ({"http_options": {"request_timeout_s": "sk-secret"}}, "http_options.request_timeout_s"),
        ({"http_options": {"keep_alive_timeout_s": "x"}}, "http_options.keep_alive_timeout_s"),
        ({"http_options": {"root_path": 5}}, "http_options.root_path"),
        ({"http_options": {"host": "127.0.0.1:8000"}}, "http_options.host"),
        ({"grpc_options": {"port": "sk-secret"}}, "grpc_options.port"),
        ({"target_capacity": 200}, "target_capacity"),
        ({"logging_config": {"encoding": "sk-secret"}}, "logging_config.encoding"),
        ({"application": {"route_prefix": "models"}}, "applications[0].route_prefix"),
        ({"application": {"route_prefix": "/models/"}}, "applications[0].route_prefix"),
        ({"application": {"name": ""}}, "applications[0].name"),
        ({"application": {"runtime_env": {"working_dir": "/sk-secret"}}}, "applications[0].runtime_env"),
        ({"application": {"deployments": [{"name": "b"}]}}, "applications[0].deployments[0].name"),
        ({"application": {"deployments": [{"name": "a", "num_replicas": "x"}]}},
         "applications[0].deployments[0]"),
    ],
)  # fmt: skip
def test_serves_own_settings(tmp_path: Path, rest: dict[str, Any], path: str) -> None:
    assert any(found.startswith(path) for found in problems(tmp_path, **rest))


def test_two_applications_with_one_prefix(tmp_path: Path) -> None:
    path = tmp_path / "plane.yaml"
    ours = {"name": "a", "import_path": "deployments.app:build", "args": {"tiers": [SIMULATED]}}
    path.write_text(
        json.dumps({"applications": [ours, {"name": "b", "import_path": "x:y", "route_prefix": "/"}]})
    )
    with pytest.raises(ConfigError, match="route prefix"):
        load_checked(str(path))


def test_serve_is_not_imported_for_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve.schema", None)
    assert problems(tmp_path, http_options={"host": "127.0.0.1", "port": 8000}) == {}


def test_the_ports_are_compared_even_if_something_else_is_wrong(tmp_path: Path) -> None:
    args = {"tiers": [{**SIMULATED, "replicas": -1}], "gateway": {"port": 8000}}
    found = problems(tmp_path, application={"args": args})
    assert set(found) == {"replicas", "applications[0].args.gateway.port"}


def test_models_of_llama_cpp_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    (tmp_path / "n-00002-of-00002.gguf").write_bytes(b"GGUF")
    for name, says in {
        "none.gguf": "doesn't exist",
        "folder": "needs a .gguf file",
        "text.gguf": "not a GGUF file",
        "pointer.gguf": "Git LFS pointer",
        "model.bin": "needs a .gguf file",
        "m-00001-of-00002.gguf": "m-00002-of-00002.gguf is missing",
        "n-00002-of-00002.gguf": "name its first part",
    }.items():
        tier = llamacpp(tmp_path / name)
        assert says in problems(tmp_path, tier)["model"]
        assert problems(tmp_path, tier, here=False) == {}
        with pytest.raises(SetupError, match=says):  # the same when the engine is started
            launchable_model(TierConfig(**tier), (), tier["model"], lambda _: None)
    assert "needs a .gguf file" in problems(tmp_path, llamacpp("org/name"))["model"]


def test_folders_of_vllm_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in {"none": "doesn't exist", "empty": "config.json is missing"}.items():
        tier = {"name": "a", "model": str(tmp_path / name), "device": "cpu"}
        assert says in problems(tmp_path, tier)["model"]
    assert problems(tmp_path, {"name": "a", "model": "org/name", "device": "cpu"}) == {}


@pytest.mark.parametrize(
    ("engine_args", "flag", "says"),
    [
        ({"ctx-size": -1}, "ctx-size", "at least 0"),
        ({"ctx-size": "4k"}, "ctx-size", "a number"),
        ({"ctx-size": 4096.5}, "ctx-size", "a whole number"),
        ({"ctx-size": 10**30}, "ctx-size", "a whole number"),
        ({"ctx-size": True}, "ctx-size", "a number"),
        ({"ctx-size": 512, "parallel": 4}, "ctx-size", "128 for each request"),
        ({"ctx-size": 100, "parallel": 1}, "ctx-size", "set it to 256"),
        ({"ctx-size": 512}, "ctx-size", "4 slots"),
        ({"ctx-size": 2048, "n-ctx": 4096}, "n-ctx", "'ctx-size' sets the same"),
        ({"parallel": 0}, "parallel", "at least 1"),
        ({"parallel": -2}, "parallel", "at least 1"),
        ({"threads": -5}, "threads", "at least -1"),
        ({"threads": 100_000}, "threads", "at most 512"),
        ({"batch-size": 0}, "batch-size", "at least 1"),
        ({"top-p": 95}, "top-p", "at most 1"),
        ({"temp": "hot"}, "temp", "a number"),
        ({"jinja": "yes"}, "jinja", "true or false"),
        ({"ctx-sze": 4096}, "ctx-sze", "did you mean 'ctx-size'?"),
        ({"bogus": 1}, "bogus", "no such flag"),
        ({"api-keys": ["sk-secret"]}, "api-keys", "can't be set here"),
        ({"hf-token": 5}, "hf-token", "text"),
        ({"chat-template": 5}, "chat-template", "text"),
    ],
)
def test_flags_of_llama_cpp(tmp_path: Path, engine_args: dict[str, Any], flag: str, says: str) -> None:
    pytest.importorskip("xllamacpp")
    found = problems(tmp_path, llamacpp("bundled:smollm2-135m", **engine_args))
    assert list(found) == [f"engine_args.{flag}"]
    assert says in found[f"engine_args.{flag}"]


def test_all_flags_of_llama_cpp_are_reported_at_once(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    tier = llamacpp(tmp_path / "none.gguf", ctx_size=-1, parallel=0, jinja="on", bogus=1)
    assert len(problems(tmp_path, tier)) == 5


def test_flags_of_llama_cpp_that_are_right(tmp_path: Path) -> None:
    args = {
        "ctx-size": 0,
        "parallel": 2,
        "threads": -1,
        "temp": 1,
        "n-gpu-layers": -1,
        "jinja": True,
        "seed": 5,
    }
    assert problems(tmp_path, llamacpp("bundled:smollm2-135m", **args)) == {}
    assert (
        problems(tmp_path, llamacpp("bundled:smollm2-135m", ctx_size=256, parallel=4, kv_unified=True)) == {}
    )


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"env": {"A=B": "sk-secret"}}, "env.A=B"),
        ({"env": {"": "sk-secret"}}, "env."),
        ({"env": {"A": "sk-secret\0"}}, "env.A"),
        ({"pass_env": ["sk-secret"]}, "pass_env[0]"),
    ],
)
def test_variables_of_an_engine(tmp_path: Path, settings: dict[str, Any], path: str) -> None:
    assert path in problems(tmp_path, {**SIMULATED, **settings})


@pytest.mark.parametrize("settings", [{"engine_args": {"max-model-len": 1}}, {"env": {"A": "b"}}])
def test_settings_that_an_endpoint_would_not_use(tmp_path: Path, settings: dict[str, Any]) -> None:
    tier = {"name": "a", "engine": "endpoint", "model": "m", "url": "http://h:1", **settings}
    assert list(problems(tmp_path, tier)) == list(settings)


@pytest.mark.parametrize("other", ["text", None, 5, [], {}, {"import_path": 5}])
def test_another_application_that_is_none(tmp_path: Path, other: Any) -> None:
    path = tmp_path / "plane.yaml"
    ours = {"import_path": "deployments.app:build", "args": {"tiers": [SIMULATED]}}
    path.write_text(json.dumps({"applications": [other, ours]}))
    with pytest.raises(ConfigError, match=r"applications\[0\].*Serve refuses it"):
        load_checked(str(path))
