"""``tierplane validate``, and what engines say of their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from controlplane.cli import main
from controlplane.cli.checking.checks import CheckStatus, check_variables
from controlplane.cli.checking.extras import extras
from controlplane.config import load_plane
from tests.support.repository import CONFIGS


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["validate", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    """A file whose keys are right and whose engine settings are not."""
    path = tmp_path / "wrong.yaml"
    path.write_text((CONFIGS / "simulated.yaml").read_text().replace("ttft-ms: 90", "ttfd-ms: 90"))
    return str(path)


def test_a_valid_file() -> None:
    code, out, _ = run(str(CONFIGS / "gpu.yaml"))
    assert code == 0
    assert "capable" in out
    assert "no problems" in out


def test_json() -> None:
    code, out, _ = run(str(CONFIGS / "gpu.yaml"), "--json")
    output = json.loads(out)
    assert code == 0
    assert output["ok"] is True
    assert output["problems"] == []
    assert [tier["gpus"] for tier in output["tiers"]] == [1.0, 1.0, 2.0]
    assert output["gpus"] == 4.0


def test_settings_of_an_engine(wrong: str) -> None:
    code, _, err = run(wrong)
    assert code == 2
    line = 1 + (CONFIGS / "simulated.yaml").read_text().splitlines().index("            ttft-ms: 90")
    assert f"line {line}: applications[0].args.tiers[1].engine_args.ttfd-ms" in err


def test_problems_as_json(wrong: str) -> None:
    code, out, _ = run(wrong, "--json")
    output = json.loads(out)
    assert code == 2
    assert output["ok"] is False
    assert [problem["path"] for problem in output["problems"]] == [
        "applications[0].args.tiers[1].engine_args.ttfd-ms"
    ]
    assert set(output["problems"][0]) == {"path", "message", "remedy", "line"}


def test_no_such_file(tmp_path: Path) -> None:
    code, _, err = run(str(tmp_path / "none.yaml"))
    assert code == 2
    assert "No such file" in err


@pytest.mark.parametrize(
    ("name", "expected"), [("cpu", ["cpu"]), ("gpu", ["gpu"]), ("laptop", ["llamacpp"]), ("simulated", [])]
)
def test_the_extras_that_make_installs(name: str, expected: list[str]) -> None:
    assert extras(load_plane(CONFIGS / f"{name}.yaml").plane) == expected


@pytest.fixture
def naming(tmp_path: Path) -> str:
    """A right file whose settings name environment variables."""
    path = tmp_path / "naming.yaml"
    far = """tiers:
        - {name: far, engine: endpoint, url: "http://far:1", model: m, api_key_env: FAR_KEY}"""
    hooks = """
      controller:
        alerts:
          webhooks:
          - url: "https://a/x"
          - url: "https://b/y"
            secret_env: HOOK_SECRET
"""
    path.write_text((CONFIGS / "simulated.yaml").read_text().replace("tiers:", far, 1) + hooks)
    return str(path)


def test_unset_variables_are_warnings(naming: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "")
    monkeypatch.delenv("HOOK_SECRET", raising=False)
    code, out, _ = run(naming, "--json")
    output = json.loads(out)
    assert (code, output["ok"], output["problems"]) == (0, True, [])
    tier, hook = output["warnings"]
    lines = Path(naming).read_text().splitlines()
    assert tier["path"] == "applications[0].args.tiers[0].api_key_env"
    assert hook["path"] == "applications[0].args.controller.alerts.webhooks[1].secret_env"
    assert "secret_env: HOOK_SECRET" in lines[hook["line"] - 1]
    assert "HOOK_SECRET is not set: nothing would be sent" in hook["message"]
    assert "set HOOK_SECRET where Ray is started" in hook["remedy"]
    code, out, _ = run(naming)
    assert code == 0
    assert "webhooks[1].secret_env" in out.replace("\n", "")
    monkeypatch.setenv("FAR_KEY", "f4r")
    monkeypatch.setenv("HOOK_SECRET", "h00k")
    code, out, _ = run(naming, "--json")
    assert json.loads(out)["warnings"] == []
    assert "h00k" not in out


def test_doctor_warns_about_an_unset_variable(naming: str) -> None:
    file = load_plane(naming)
    [check] = check_variables(file, {"FAR_KEY": "f4r"})
    assert check.verdict is CheckStatus.WARN
    assert check.message.startswith("applications[0].args.controller.alerts.webhooks[1].secret_env: ")
    assert "HOOK_SECRET" in check.remedy
    assert check_variables(file, {"FAR_KEY": "f4r", "HOOK_SECRET": "h00k"}) == []


def _plane(tmp_path: Path, *tiers: Any, **rest: Any) -> str:
    path = tmp_path / "plane.yaml"
    application = {"import_path": "deployments.app:build", "args": {"tiers": tiers, **rest}}
    path.write_text(json.dumps({"applications": [application]}))
    return str(path)


@pytest.mark.parametrize(
    "models", [("orga/Llama", "orgb/Llama"), ("/models/qwen/final", "/models/llama/final")]
)
def test_two_models_with_one_id_are_a_warning(tmp_path: Path, models: tuple[str, str]) -> None:
    tiers = [{"name": n, "engine": "simulated", "model": m} for n, m in zip("ab", models, strict=True)]
    code, out, _ = run(_plane(tmp_path, *tiers))
    assert code == 0
    assert "warning: tiers[0]" in out
    assert "(tier b)" in out


@pytest.mark.parametrize(
    "tiers",
    [
        [{"name": "a", "engine": "simulated"}, {"name": "llama", "engine": "simulated", "model": "x/a"}],
        [{"name": "a", "engine": "simulated", "model": "org/auto"}],
    ],
)
def test_a_model_that_can_not_be_asked_for_by_its_id_is_a_warning(
    tmp_path: Path, tiers: list[dict[str, Any]]
) -> None:
    code, out, _ = run(_plane(tmp_path, *tiers))
    assert code == 0
    assert "never mean the model" in out


def test_a_tier_named_auto_is_refused(tmp_path: Path) -> None:
    code, _, err = run(_plane(tmp_path, {"name": "auto", "engine": "simulated"}))
    assert code == 2
    assert "can't be a tier's name" in err
