from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path / "run"))
