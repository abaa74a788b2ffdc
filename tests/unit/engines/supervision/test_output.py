from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.engines.external import ExternalEngine, address_of
from controlplane.engines.output import ending, last_error, plain
from controlplane.engines.supervision.process import EngineOutput, LogFile
from controlplane.errors import EngineStartError


def lines_of(*chunks: bytes, secret: str = "") -> tuple[list[str], EngineOutput]:
    seen: list[str] = []
    output = EngineOutput(secret, None, seen.append)
    for chunk in chunks:
        output.feed(chunk)
    output.end()
    return seen, output


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"on", b"e\r", b"\ntwo"], ["one", "two"]),
        ([b"10%\r20%\r", b"30%\n"], ["10%", "20%", "30%"]),
        ([b"\n\n  \n"], []),
        ([b"\x1b[32mgreen\x1b[0m\n"], ["green"]),
        ([b"broken \xff\n"], ["broken \ufffd"]),
        ([b"x" * 9000], ["x" * 4000]),
    ],
)
def test_output_becomes_lines(chunks: list[bytes], lines: list[str]) -> None:
    assert lines_of(*chunks)[0] == lines


def test_the_secret_is_masked_even_across_chunks() -> None:
    assert lines_of(b"key=s3c", b"ret!\n", secret="s3cret")[0] == ["key=***!"]


def test_only_the_last_lines_are_stored() -> None:
    _, output = lines_of(b"".join(b"%d\n" % n for n in range(1000)))
    assert len(output.lines) == 400
    assert output.lines[-1] == "999"


def test_the_log_file_is_bounded(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "logs" / "a.log", max_bytes=1000)
    for number in range(200):
        file.write(f"line {number:03}")
    file.close()
    older = tmp_path / "logs" / "a.log.1"
    assert file.path.stat().st_size <= 1010
    assert older.stat().st_size <= 1010
    assert (older.read_text() + file.path.read_text()).splitlines()[-1] == "line 199"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("(EngineCore pid=2) ERROR 11-22 18:07:03 [core.py:1] ValueError: odd", "ValueError: odd"),
        ("(APIServer pid=6577) ValueError: odd", "ValueError: odd"),
        ("ValueError: odd", "ValueError: odd"),
    ],
)
def test_log_prefixes_are_removed(line: str, text: str) -> None:
    assert plain(line) == text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "did not become ready"),
        (3, "exited with code 3"),
        (-15, "was killed by SIGTERM"),
        (-70, "was killed by signal 70"),
    ],
)
def test_endings(code: int | None, text: str) -> None:
    assert ending(code) == text


def test_an_exception_is_preferred_to_a_later_error_line() -> None:
    lines = ["ValueError: the cause", "ERROR: shutting down", "nanobind: leaked 3 types!"]
    assert last_error("it", lines, 1).summary == "it exited with code 1: ValueError: the cause"


def endpoint(**settings: Any) -> TierConfig:
    return TierConfig(name="far", engine="endpoint", model="m", url="http://x:1/v1/", **settings)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(endpoint()) == ("http://x:1", "")
    monkeypatch.setenv("FAR_KEY", "k")
    assert address_of(endpoint(api_key_env="FAR_KEY")) == ("http://x:1", "k")
    monkeypatch.delenv("FAR_KEY")
    with pytest.raises(
        EngineStartError, match=r"FAR_KEY, which holds the API key of tier .far. \(api_key_env\), is not set"
    ):
        address_of(endpoint(api_key_env="FAR_KEY"))
    assert not ExternalEngine.has_process


@pytest.mark.parametrize("key", ["a\r\nx-evil: 1", "a\nb", "käse", "a\x7f"])
def test_a_key_that_no_header_can_have_is_refused_and_not_repeated(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", key)
    with pytest.raises(EngineStartError, match="FAR_KEY") as caught:
        address_of(endpoint(api_key_env="FAR_KEY"))
    assert key not in str(caught.value)


def test_a_line_break_behind_a_key_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "k\n")
    assert address_of(endpoint(api_key_env="FAR_KEY")) == ("http://x:1", "k")
