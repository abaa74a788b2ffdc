"""The folders for tierplane's files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from controlplane.errors import SetupError
from controlplane.paths import cache_dir, run_dir


def test_named_folders_are_created_for_their_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path / "a" / "run"))
    monkeypatch.setenv("TIERPLANE_CACHE_DIR", str(tmp_path / "cache"))
    assert run_dir() == tmp_path / "a" / "run"
    assert cache_dir() == tmp_path / "cache"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (run_dir(), cache_dir())] == [0o700, 0o700]


def test_a_run_folder_that_existed_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in (0o755, 0o777, 0o710):
        tmp_path.chmod(mode)
        monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
        assert stat.S_IMODE(run_dir().stat().st_mode) == 0o700


def test_the_run_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(SetupError, match="belongs to another user"):
        run_dir()


@pytest.mark.parametrize(("xdg", "expected"), [("/x", "xdg"), ("relative", "home"), (None, "home")])
def test_the_default_is_the_users_cache(
    xdg: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIERPLANE_RUN_DIR", raising=False)
    monkeypatch.delenv("TIERPLANE_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if xdg is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg == "/x" else xdg)
    base = tmp_path / "xdg" if expected == "xdg" else tmp_path / "home" / ".cache"
    assert cache_dir() == base / "tierplane"
    assert run_dir() == base / "tierplane" / "run"


def test_the_error_about_a_folder_that_cannot_be_created_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIERPLANE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(SetupError, match="set TIERPLANE_CACHE_DIR"):
        cache_dir()
    monkeypatch.setenv("TIERPLANE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="set TIERPLANE_CACHE_DIR"):
        cache_dir()
