import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.cli.lifecycle.logs import command, log_files, readable
from controlplane.logs import remove_old_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
    logs = tmp_path / "logs"
    logs.mkdir()
    for index, name in enumerate(["controller", "gateway-1", "balanced-a1", "balanced-a1-engine"]):
        path = logs / f"{name}.log"
        path.write_text("".join(f"{name} line {i}\n" for i in range(10)))
        os.utime(path, (1000 + index, 1000 + index))
    (logs / "notes.txt").write_text("not a log\n")
    return logs


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), ["controller", "gateway-1", "balanced-a1", "balanced-a1-engine"]),
        (("balanced",), ["balanced-a1", "balanced-a1-engine"]),
        (("gateway", "controller"), ["controller", "gateway-1"]),
        (("bal",), []),
    ],
)
def test_the_log_files_of_a_name(folder: Path, names: tuple[str, ...], expected: list[str]) -> None:
    assert [path.stem for path in log_files(folder, names)] == expected


def test_the_last_lines_of_each_file(folder: Path) -> None:
    result = CliRunner().invoke(command, ["controller", "gateway", "-n", "2"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "controller | controller line 8",
        "controller | controller line 9",
        "gateway-1 | gateway-1 line 8",
        "gateway-1 | gateway-1 line 9",
    ]


def test_no_lines_at_all(folder: Path) -> None:
    assert CliRunner().invoke(command, ["controller", "-n", "0"]).output == ""


def test_a_name_without_logs_is_an_error(folder: Path) -> None:
    result = CliRunner().invoke(command, ["capable"])
    assert result.exit_code != 0
    assert "no logs of capable" in str(result.exception)


def test_living_replicas_by_default_and_ended_ones_on_request(folder: Path) -> None:
    with (folder / "balanced-a1.log").open("a"), (folder / "controller.log").open("a"):
        living = CliRunner().invoke(command, ["-n", "1"]).output
        ended = CliRunner().invoke(command, ["-n", "1", "--previous"]).output
        none = CliRunner().invoke(command, ["gateway"])
    assert [line.split(" | ")[0] for line in living.splitlines()] == ["controller", "balanced-a1"]
    assert [line.split(" | ")[0] for line in ended.splitlines()] == ["gateway-1", "balanced-a1-engine"]
    assert "no process of gateway runs: `tierplane logs --previous`" in str(none.exception)


def test_a_misspelled_tier_is_recognised(folder: Path) -> None:
    assert "did you mean balanced?" in str(CliRunner().invoke(command, ["balancd"]).exception)


def test_old_logs_of_ended_processes_are_removed(folder: Path) -> None:
    (folder / "balanced-a1.log.1").write_text("older\n")
    with (folder / "controller.log").open("a"):
        remove_old_files(folder, keep=2)
        kept = {path.name for path in folder.glob("*.log*")}
    assert kept == {"controller.log", "balanced-a1.log", "balanced-a1.log.1", "balanced-a1-engine.log"}
    remove_old_files(folder, keep=1)
    assert {path.name for path in folder.glob("*.log*")} == {"balanced-a1-engine.log"}


def test_control_sequences_in_a_log_are_not_printed(folder: Path) -> None:
    event = json.dumps({"event": "failed", "reason": "\x1b]52;c;cHduZWQ=\x07"})
    (folder / "controller.log").write_text(f"{event}\n\x1b]0;title\x07plain\n")
    for flags in ([], ["--raw"]):
        shown = CliRunner().invoke(command, ["controller", *flags]).output
        assert "plain" in shown
        assert "\x1b" not in shown


def test_a_json_line_is_made_readable() -> None:
    line = json.dumps(
        {
            "event": "endpoint ready",
            "timestamp": "2026-01-02T03:04:05.6Z",
            "level": "info",
            "component": "tier",
            "tier": "balanced",
            "reason": "two words",
            "port": 8080,
        }
    )
    assert readable(line) == '03:04:05 info    endpoint ready  tier=balanced reason="two words" port=8080'


@pytest.mark.parametrize("line", ["INFO 01-02 loading", "{not json", '{"a": 1}', "{}", ""])
def test_any_other_line_is_unchanged(line: str) -> None:
    assert readable(line) == line


def test_raw_lines_are_unchanged(folder: Path) -> None:
    (folder / "controller.log").write_text('{"event": "x"}\n')
    assert CliRunner().invoke(command, ["controller", "--raw"]).output == '{"event": "x"}\n'
