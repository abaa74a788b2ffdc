import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from controlplane import logs


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    for package in ("controlplane", "deployments"):
        logger = logging.getLogger(package)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_json_with_the_context_of_its_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "tier.log"
    logs.setup("auto", "info", file=path, component="tier", tier="balanced")
    structlog.stdlib.get_logger("controlplane.test").info("ready", port=1)
    (line,) = lines(path)
    assert line["event"] == "ready"
    assert (line["component"], line["tier"], line["port"], line["level"]) == ("tier", "balanced", 1, "info")
    assert json.loads(capsys.readouterr().err) == line


def test_plain_loggers_of_our_packages_are_written_too(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    logs.setup("json", "info", file=path)
    logging.getLogger("deployments.test").warning("what %s", "happened", extra={"tier": "balanced"})
    logging.getLogger("another.package").warning("not ours")
    (line,) = lines(path)
    assert (line["event"], line["level"], line["tier"]) == ("what happened", "warning", "balanced")


def test_lines_below_the_level_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    logs.setup("json", "warning", file=path)
    log = structlog.stdlib.get_logger("controlplane.test")
    log.info("quiet")
    log.error("loud")
    assert [line["event"] for line in lines(path)] == ["loud"]


@pytest.mark.parametrize("key", ["secret", "api_key", "authorization", "token"])
def test_values_that_are_named_like_secrets_are_not_written(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.log"
    logs.setup("json", "info", file=path)
    structlog.stdlib.get_logger("controlplane.test").info("started", **{key: "s3cret"})
    logging.getLogger("controlplane.test").info("started", extra={key: "s3cret"})
    assert "s3cret" not in path.read_text()
    assert len(lines(path)) == 2


def test_a_second_set_up_replaces_the_first(tmp_path: Path) -> None:
    logs.setup("json", "info", file=tmp_path / "one.log")
    logs.setup("json", "info", file=tmp_path / "two.log")
    logging.getLogger("controlplane.test").info("once")
    assert (tmp_path / "one.log").read_text() == ""
    assert len(lines(tmp_path / "two.log")) == 1


def test_a_line_has_the_traceback_of_its_error(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    logs.setup("json", "info", file=path)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.stdlib.get_logger("controlplane.test").exception("failed")
    assert "broken" in json.dumps(lines(path)[0]["exception"])


def test_auto_is_json_unless_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert logs.resolve_format("auto") == "json"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert logs.resolve_format("auto") == "console"
    assert logs.resolve_format("json") == "json"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_local_variables(
    log_format: logs.LogFormat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    logs.setup(log_format, "info", file=path)

    def fail() -> None:
        bearer = "very" + "-private"
        raise RuntimeError(f"failed with {len(bearer)} characters")

    try:
        fail()
    except RuntimeError:
        structlog.stdlib.get_logger("controlplane.test").exception("it failed")
    written = path.read_text() + capsys.readouterr().err
    assert "failed with 12 characters" in written
    assert "very-private" not in written
