from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path / "run"))
