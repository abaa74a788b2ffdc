"""Configuration files: every problem at once, with path, line and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controlplane.config import PlaneConfig, TierConfig, load_plane, parse_plane
from controlplane.errors import ConfigError, Problem
from tests.support.repository import CONFIGS as CONFIG_FOLDER

CONFIGS = sorted(CONFIG_FOLDER.glob("*.yaml"))

FRAME = """\
http_options: {{host: 127.0.0.1, port: 8000}}
applications:
- name: tierplane
  import_path: deployments.app:build
  args:
    tiers:
{tiers}
"""


def problems_of(values: Any) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_plane(values)
    found = {problem.path: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "two problems at one path"
    return found


def tier(**values: Any) -> dict[str, Any]:
    return {"name": "a", "engine": "simulated", **values}


def load_text(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "plane.yaml"
    path.write_text(text)
    return load_plane(path)


def file_problems(tmp_path: Path, text: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    assert str(tmp_path / "plane.yaml") in str(caught.value)
    return list(caught.value.problems)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    file = load_plane(path)
    assert [each.name for each in file.plane.tiers] == ["lightweight", "balanced", "capable"]
    assert file.application == "tierplane"
    assert file.http_port == 8000
    assert file.plane == parse_plane(file.raw["applications"][0]["args"])


def test_there_are_shipped_files() -> None:
    assert {"cpu", "gpu", "laptop", "simulated"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(
    ("values", "path", "message", "remedy"),
    [
        ({"tiers": []}, "tiers", "at least 1 item", ""),
        ({}, "tiers", "missing", "cheapest"),
        (None, "", "must be a mapping", ""),
        ([1], "", "must be a mapping", ""),
        ({"tiers": [3]}, "tiers[0]", "must be a mapping, not 3", ""),
        ({"tiers": [{"engine": "simulated"}]}, "tiers[0].name", "missing", "that clients use"),
        ({"tiers": [tier(name="A")]}, "tiers[0].name", "not 'A'", ""),
        ({"tiers": [tier(engin="vllm")]}, "tiers[0].engin", "unknown key 'engin'", "did you mean 'engine'"),
        (
            {"tiers": [tier(engine="vllm", model="m", gpu_models=["L4", "H100-80"])]},
            "tiers[0].gpu_models[1]",
            "'H100-80' is not in the table of GPU models",
            "did you mean 'H100-80G'?",
        ),
        (
            {"tiers": [tier(gpu_models=["L4"])]},
            "tiers[0].gpu_models",
            "this tier uses no GPU",
            "remove it",
        ),
        (
            {"tiers": [tier(engine="vllm", model="m", device="cpu", pipeline_across_nodes=True)]},
            "tiers[0].pipeline_across_nodes",
            "this tier uses no GPU",
            "remove it",
        ),
        (
            {"tiers": [tier(engine="vllm", model="m", pipeline_across_nodes=True)]},
            "tiers[0].pipeline_parallel_size",
            "one stage can't be on several nodes",
            "number of stages",
        ),
        ({"tiers": [tier(engine="vlm")]}, "tiers[0].engine", "not 'vlm'", "did you mean 'vllm'"),
        ({"tiers": [tier(max_model_len=1)]}, "tiers[0].max_model_len", "unknown", "engine_args"),
        ({"tiers": [tier(replicas="1")]}, "tiers[0].replicas", "whole number, not '1'", "remove the quotes"),
        ({"tiers": [tier(replicas=1.5)]}, "tiers[0].replicas", "whole number, not 1.5", ""),
        ({"tiers": [tier(replicas=-1)]}, "tiers[0].replicas", "greater than or equal to 0, not -1", ""),
        ({"tiers": [tier(replicas=True)]}, "tiers[0].replicas", "whole number, not true", ""),
        (
            {"tiers": [tier(drain_timeout_s="1e3")]},
            "tiers[0].drain_timeout_s",
            "a number",
            "remove the quotes",
        ),
        ({"tiers": [tier(drain_timeout_s=float("nan"))]}, "tiers[0].drain_timeout_s", "finite", ""),
        ({"tiers": [tier(trust_remote_code="yes")]}, "tiers[0].trust_remote_code", "true or false", "quotes"),
        ({"tiers": [tier(complexities=["simpel"])]}, "tiers[0].complexities[0]", "simple", "'simple'"),
        ({"tiers": [tier(agent_types="x")]}, "tiers[0].agent_types", "must be a list, not 'x'", ""),
        ({"tiers": [tier(restart={"max": 1})]}, "tiers[0].restart.max", "unknown key", "max_restarts"),
        ({"tiers": [tier(engine_args={"a": {"b": 1}})]}, "tiers[0].engine_args.a", "not a mapping", ""),
        (
            {"tiers": [tier(engine_args={"--a": 1})]},
            "tiers[0].engine_args.--a",
            "not the name of a flag",
            "dashes",
        ),
        (
            {"tiers": [tier(engine_args={"host": "x"})]},
            "tiers[0].engine_args.host",
            "can't be set",
            "tierplane",
        ),
        ({"tiers": [tier(url="http://x")]}, "tiers[0].url", "only engine 'endpoint'", "remove it"),
        ({"tiers": [tier(engine="endpoint", model="m")]}, "tiers[0].url", "needs it", "/v1"),
        (
            {"tiers": [tier(engine="endpoint", model="m", url="x:1")]},
            "tiers[0].url",
            "must be an http:// or https:// address",
            "http://",
        ),
        ({"tiers": [tier(engine="vllm")]}, "tiers[0].model", "missing", "bundled:smollm2-135m"),
        ({"tiers": [tier(model="bundled:x")]}, "tiers[0].model", "no bundled model", "smollm2"),
        (
            {"tiers": [tier(engine="vllm", model="m", gpu_share=0.5, tensor_parallel_size=2)]},
            "tiers[0].gpu_share",
            "parallel",
            "set it to 1",
        ),
        (
            {"tiers": [tier(engine_args={"gpus": 1.5})]},
            "tiers[0].engine_args.gpus",
            "not a number",
            "whole number",
        ),
        (
            {"tiers": [tier(tensor_parallel_size=2)]},
            "tiers[0].tensor_parallel_size",
            "does not support this",
            "remove it",
        ),
        ({"tiers": [tier(), tier()]}, "tiers[1].name", "tiers[0] is named 'a' too", "its own"),
        (
            {"tiers": [tier(agent_types=["x"]), tier(name="b", agent_types=["y", "x"])]},
            "tiers[1].agent_types[1]",
            "already served by tier 'a'",
            "one tier",
        ),
        ({"tiers": [tier(min_tier="b"), tier(name="b")]}, "tiers[0].min_tier", "before it", "a"),
        (
            {"tiers": [tier()], "gateway": {"default_tier": "b"}},
            "gateway.default_tier",
            "no tier is named 'b'",
            "known: a",
        ),
        ({"tiers": [tier()], "gateway": {"port": "80"}}, "gateway.port", "whole number or 0", "quotes"),
        ({"tiers": [tier()], "gateway": {"port": 70000}}, "gateway.port", "65535", ""),
        (
            {"tiers": [tier()], "gateway": {"traces_endpoint": "otlp"}},
            "gateway.traces_endpoint",
            "must be an http:// or https:// address",
            "write it as",
        ),
        ({"tiers": [tier()], "gatway": {}}, "gatway", "unknown key", "did you mean 'gateway'"),
        ({"tiers": [tier()], "controller": 1}, "controller", "must be a mapping", ""),
    ],
)
def test_one_problem(values: Any, path: str, message: str, remedy: str) -> None:
    found = problems_of(values)
    assert list(found) == [path]
    assert message in found[path].message
    assert remedy in found[path].remedy


@pytest.mark.parametrize(
    ("flag", "message", "remedy"),
    [
        ("max-model-length", "no such flag", "did you mean 'max-model-len'?"),
        ("guided-decoding-backend", "no longer has this flag", "structured-outputs-config"),
        ("quite-another-thing", "no such flag", ""),
    ],
)
def test_unknown_vllm_flags(flag: str, message: str, remedy: str) -> None:
    found = problems_of({"tiers": [tier(engine="vllm", model="m", engine_args={flag: 1})]})
    assert message in found[f"tiers[0].engine_args.{flag}"].message
    assert remedy in found[f"tiers[0].engine_args.{flag}"].remedy


@pytest.mark.parametrize(
    ("flag", "value"), [("max-model-len", 1), ("max_model_len", 1), ("no-enable-prefix-caching", True)]
)
def test_known_vllm_flags(flag: str, value: Any) -> None:
    parse_plane({"tiers": [tier(engine="vllm", model="m", engine_args={flag: value})]})


def test_everything_at_once() -> None:
    found = problems_of(
        {
            "tiers": [
                # An invalid field doesn't hide contradictions between other fields …
                tier(replicas="1", url="http://x", engine_args={"a": {}, "--b": 1, "port": 2}),
                # … nor problems in other tiers, or between tiers.
                tier(engine="vllm", agent_types=["x"]),
                "not a tier",
                tier(name="c", engine="endpoint", model="m", agent_types=["x"], nonsense=1),
            ],
            "gateway": {"port": "x", "default_tier": "d"},
            "controller": {"log_level": "loud"},
        }
    )
    assert set(found) == {
        "tiers[0].replicas",
        "tiers[0].url",
        "tiers[0].engine_args.a",
        "tiers[0].engine_args.--b",
        "tiers[0].engine_args.port",
        "tiers[1].name",
        "tiers[1].model",
        "tiers[2]",
        "tiers[3].url",
        "tiers[3].agent_types[0]",
        "tiers[3].nonsense",
        "gateway.port",
        "controller.log_level",
    }


HOOK = {"url": "https://x/y"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # An invalid value in a list item hides nothing outside the list, …
        (
            {"webhooks": [{**HOOK, "timeout_s": -1}], "rules": {"Nonsense": {}}},
            {"webhooks[0].timeout_s", "rules.Nonsense"},
        ),
        # … nor in other items, which are reported with their own indices, nor between items.
        ({"webhooks": [{"url": "x"}, HOOK, HOOK]}, {"webhooks[0].url", "webhooks[2].url"}),
        ({"webhooks": [3, HOOK, {"url": 4}, HOOK]}, {"webhooks[0]", "webhooks[2].url", "webhooks[3].url"}),
        ({"webhooks": [{}, HOOK, HOOK]}, {"webhooks[0].url", "webhooks[2].url"}),
        # A contradiction between items hides nothing outside the list.
        ({"webhooks": [HOOK, HOOK], "repeat_s": "x"}, {"webhooks[1].url", "repeat_s"}),
        (
            {"rules": {"TierplaneSheds": {"for": 1, "threshold": 2}}},
            {"rules.TierplaneSheds.for", "rules.TierplaneSheds.threshold"},
        ),
    ],
)
def test_a_problem_in_a_list_of_the_controllers_hides_no_others(values: Any, expected: set[str]) -> None:
    found = problems_of({"tiers": [tier()], "controller": {"alerts": values, "reports": {"samples": 1}}})
    assert set(found) == {f"controller.alerts.{path}" for path in expected} | {"controller.reports.samples"}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (
            {
                "schedules": [{"start": "8", "end": "09:00"}, {"start": "08:00", "end": "09:00"}],
                "max_replicas": 0,
            },
            {"schedules[0].start", "schedules[1].min_replicas", "max_replicas"},
        ),
        ({"min_replicas": 5, "max_replicas": 2, "schedules": [1]}, {"schedules[0]", "min_replicas"}),
        (
            {"schedules": [{"start": "08:00", "end": "09:00", "days": ["mo"], "min_replicas": 99}]},
            {"schedules[0].days[0]", "schedules[0].min_replicas"},
        ),
        # The bounds are unknown, so "20 is outside the bounds" would be a guess.
        ({"max_replicas": "30"}, {"max_replicas"}),
    ],
)
def test_a_problem_in_a_list_of_a_tier_hides_no_others(scaling: dict[str, Any], expected: set[str]) -> None:
    replicas = {} if scaling.get("schedules") else {"replicas": 20}
    found = problems_of({"tiers": [tier(scaling=scaling, **replicas)]})
    assert set(found) == {f"tiers[0].scaling.{path}" for path in expected}


def test_a_finding_that_depends_on_an_invalid_field_is_not_reported() -> None:
    """The engine is unknown, so "only engine 'endpoint' has this setting" would be a guess."""
    assert set(problems_of({"tiers": [tier(engine="endpont", url="http://x", model="m")]})) == {
        "tiers[0].engine"
    }


def test_a_secret_in_the_environment_is_not_shown() -> None:
    found = problems_of({"tiers": [tier(env={"HF_TOKEN": 918273})]})
    assert "918273" not in str(found["tiers[0].env.HF_TOKEN"])
    assert "quotes" in found["tiers[0].env.HF_TOKEN"].remedy


def test_models_check_the_same_without_a_file() -> None:
    with pytest.raises(ValueError, match="only engine 'endpoint'"):
        TierConfig(name="a", engine="simulated", url="http://x")
    with pytest.raises(ValueError, match="is named"):
        PlaneConfig(tiers=[TierConfig(name="a", engine="simulated")] * 2)


def test_lines_and_order(tmp_path: Path) -> None:
    text = FRAME.format(
        tiers="    - name: a\n      engine: simulated\n      replicas: x\n      nme: b\n    - nam: c"
    )
    problems = file_problems(tmp_path, text)
    prefix = "applications[0].args.tiers"
    assert [problem.line for problem in problems] == [9, 10, 11, 11, 11]
    assert {(problem.line, problem.path) for problem in problems} == {
        (9, f"{prefix}[0].replicas"),
        (10, f"{prefix}[0].nme"),
        (11, f"{prefix}[1].name"),
        (11, f"{prefix}[1].model"),
        (11, f"{prefix}[1].nam"),
    }
    assert str(problems[0]).startswith("line 9: applications[0].args.tiers[0].replicas: must be")


def test_duplicate_keys(tmp_path: Path) -> None:
    text = FRAME.format(tiers="    - name: a\n      engine: simulated\n      name: b\n      engine: vllm")
    found = {problem.path: problem for problem in file_problems(tmp_path, text)}
    assert found["applications[0].args.tiers[0].name"].line == 9
    assert "line 7" in found["applications[0].args.tiers[0].name"].message
    assert "applications[0].args.tiers[0].engine" in found


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [("a: [1, 2\nb: 3\n", 2, "column 2"), ("a: 1\n b: 2\n", 2, "column 3"), ("a: \tx: 1\n", 1, "column")],
)
def test_syntax_errors(tmp_path: Path, text: str, line: int, column: str) -> None:
    [problem] = file_problems(tmp_path, text)
    assert problem.line == line
    assert "is not valid YAML" in problem.message
    assert column in problem.message


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("", "", "must be a mapping"),
        ("- 1", "", "must be a mapping"),
        ("applications: []", "applications", "at least 1 item"),
        ("http_option: {}\napplications: []", "http_option", "unknown key"),
        ("applications: [{import_path: a:b, args: {}}]", "applications[0].import_path", "deployments.app"),
        ("applications: [{import_path: a:b}, {import_path: c:d}]", "applications", "none of the"),
        ("applications: [{import_path: deployments.app:build}]", "applications[0].args", "missing"),
        ("applications: [{import_path: deployments.app:build, args: }]", "applications[0].args", "mapping"),
        ("applications: [{args: {}}]", "applications[0].import_path", "missing"),
        (
            "applications: [&a {import_path: deployments.app:build, args: {}}, *a]",
            "applications[1]",
            "a second application of tierplane, after applications[0]",
        ),
    ],
)
def test_problems_around_tierplanes_own_settings(tmp_path: Path, text: str, path: str, message: str) -> None:
    found = {problem.path: problem for problem in file_problems(tmp_path, text)}
    assert path in found
    assert message in found[path].message


def test_the_gateway_and_the_ingress_need_different_ports(tmp_path: Path) -> None:
    tiers = "    - {name: a, engine: simulated}\n    gateway: {port: 8000}"
    [problem] = file_problems(tmp_path, FRAME.format(tiers=tiers))
    assert problem.path == "applications[0].args.gateway.port"
    assert problem.line == 8


def test_a_file_may_have_other_applications(tmp_path: Path) -> None:
    text = FRAME.format(tiers="    - {name: a, engine: simulated}")
    text += "- {name: other, import_path: other:app, route_prefix: /other}\n"
    assert load_text(tmp_path, text).application == "tierplane"


def test_serves_defaults(tmp_path: Path) -> None:
    text = (
        "applications: [{import_path: deployments.app:build, args: {tiers: [{name: a, engine: simulated}]}}]"
    )
    file = load_text(tmp_path, text)
    assert (file.application, file.route_prefix, file.http_host, file.http_port) == (
        "default",
        "/",
        "0.0.0.0",
        8000,
    )


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: &x {b: *x}"])
def test_a_file_that_contains_itself_is_rejected(tmp_path: Path, text: str) -> None:
    assert file_problems(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_plane(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_plane(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_plane(tmp_path / "latin.yaml")
