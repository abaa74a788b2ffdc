"""``tierplane keys`` without a running plane: in its store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.core.access.keys import digest_of


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments])


def value(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_a_key_can_be_created_before_the_first_start(run_dir: Path) -> None:
    made = value(
        *("create", "--name", "agent", "--team", "search", "--tiers", "lightweight, balanced"),
        *("--label", "env=prod", "--max-priority", "high", "--expires", "30d"),
    )
    assert made["key"].startswith(f"tp_{made['id']}_")
    assert made["tiers"] == ["lightweight", "balanced"]
    assert made["labels"] == {"env": "prod"}
    listed = run("list", "--json")
    assert [each["name"] for each in json.loads(listed.stdout)["keys"]] == ["agent"]
    secret = made["key"].split("_", 2)[2]  # it may have the character, too
    stored = b"".join(path.read_bytes() for path in run_dir.iterdir() if path.is_file())
    assert digest_of(made["key"]).encode() in stored
    assert secret.encode() not in stored
    assert secret not in listed.output + run("show", "agent").output


def test_the_list_fits_a_terminal_and_hides_what_is_revoked() -> None:
    run("create", "--name", "a" * 60, "--team", "t" * 60)
    run("create", "--name", "gone")
    assert run("revoke", "gone").exit_code == 0
    assert "gone" not in run("list").stdout
    assert "revoked" in run("list", "--all").stdout
    assert run("show", "nobody").exit_code == 1


def test_a_rotated_key_is_another_one_with_the_same_id() -> None:
    first = value("create", "--name", "agent")
    second = value("rotate", "agent", "--grace", "1h")
    assert first["id"] == second["id"]
    assert first["key"] != second["key"]
    assert second["previous_until_unix_s"] > second["created_unix_s"] + 3000


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "--name", "x\x1b"],
        ["create", "--name", "x", "--expires", "2001-01-01"],
        ["create", "--name", "x", "--expires", "soon"],
        ["create", "--name", "x", "--label", "env"],
        ["create", "--name", "x", "--role", "god"],
        ["rotate", "x", "--grace", "later"],
        ["revoke", "nobody"],
    ],
)
def test_what_makes_no_sense_is_refused_and_named(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    assert json.loads(run("list", "--json").stdout)["keys"] == []
