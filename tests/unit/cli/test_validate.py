"""``tierplane validate``, and what engines say of their settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.cli import main
from controlplane.cli.extras import extras
from controlplane.config import load_plane

CONFIGS = Path(__file__).parents[3] / "configs"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["validate", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    """A file whose keys are right and whose engine settings are not."""
    path = tmp_path / "wrong.yaml"
    path.write_text((CONFIGS / "simulated.yaml").read_text().replace("ttft-ms: 90", "ttfd-ms: 90"))
    return str(path)


def test_a_right_file() -> None:
    code, out, _ = run(str(CONFIGS / "gpu.yaml"))
    assert code == 0
    assert "capable" in out
    assert "no problem" in out


def test_json() -> None:
    code, out, _ = run(str(CONFIGS / "gpu.yaml"), "--json")
    said = json.loads(out)
    assert code == 0
    assert said["ok"] is True
    assert said["problems"] == []
    assert [tier["gpus"] for tier in said["tiers"]] == [1.0, 1.0, 2.0]
    assert said["gpus"] == 4.0


def test_settings_of_an_engine(wrong: str) -> None:
    code, _, err = run(wrong)
    assert code == 2
    line = 1 + (CONFIGS / "simulated.yaml").read_text().splitlines().index("            ttft-ms: 90")
    assert f"line {line}: applications[0].args.tiers[1].engine_args.ttfd-ms" in err


def test_problems_as_json(wrong: str) -> None:
    code, out, _ = run(wrong, "--json")
    said = json.loads(out)
    assert code == 2
    assert said["ok"] is False
    assert [problem["path"] for problem in said["problems"]] == [
        "applications[0].args.tiers[1].engine_args.ttfd-ms"
    ]
    assert set(said["problems"][0]) == {"path", "message", "remedy", "line"}


def test_no_such_file(tmp_path: Path) -> None:
    code, _, err = run(str(tmp_path / "none.yaml"))
    assert code == 2
    assert "No such file" in err


@pytest.mark.parametrize(
    ("name", "expected"), [("cpu", ["cpu"]), ("gpu", ["gpu"]), ("laptop", ["llamacpp"]), ("simulated", [])]
)
def test_extras_that_make_installs(name: str, expected: list[str]) -> None:
    assert extras(load_plane(CONFIGS / f"{name}.yaml").plane) == expected
