"""tierplane from a wheel, without a checkout: in an environment of its own and from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controlplane.ray_cluster import session
from controlplane.ray_cluster.ports import free_port
from tests.support.repository import CONFIGS, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

_NOT_INSTALLED = {"PYTHONPATH", "RAY_ADDRESS", "TIERPLANE_RUN_DIR", session.PLANE_ID_VARIABLE}


@dataclass
class Installation:
    """An environment with the wheel, and an empty folder to run commands in."""

    python: Path
    folder: Path
    run_dir: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if key not in _NOT_INSTALLED}
        return subprocess.run(
            [self.python.parent / "tierplane", *arguments],
            cwd=self.folder,
            env={**env, "TIERPLANE_RUN_DIR": str(self.run_dir)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    for folder in ("controlplane", "deployments", "configs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=unwanted)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(base),
        str(source),
    ]
    subprocess.run([*pip, *build], check=True, timeout=200)
    [wheel] = base.glob("*.whl")
    venv.create(base / "env", symlinks=True, with_pip=False)
    python = base / "env" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
        timeout=200,
    )
    # The packages that tierplane needs, from the environment of the tests; its own tierplane comes after.
    [site] = (base / "env" / "lib").glob("python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (base / "work").mkdir()
    run_dir = Path(tempfile.mkdtemp(prefix="tp-wheel-", dir="/tmp"))
    place = Installation(python, base / "work", run_dir)
    yield place
    if (run_dir / "up.json").exists():
        place.run("down", "--now")
    shutil.rmtree(run_dir, ignore_errors=True)


def test_examples_come_with_the_wheel(installed: Installation) -> None:
    listed = installed.run("init", "--list")
    assert listed.stdout.split() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    for name in listed.stdout.split():
        written = installed.run("init", f"{name}.yaml", "--example", name)
        assert written.returncode == 0, written.stderr
        assert f"tierplane up {name}.yaml" in written.stdout
        text = (installed.folder / f"{name}.yaml").read_text()
        assert "configs/" not in text
        assert f" {name}.yaml" in text
        checked = installed.run("validate", f"{name}.yaml")
        assert checked.returncode == 0, checked.stderr
    again = installed.run("init", "laptop.yaml")
    assert again.returncode == 1
    assert "exists" in again.stderr


def test_messages_name_what_a_user_of_the_wheel_can_do(installed: Installation) -> None:
    nothing = installed.run("up")
    assert nothing.returncode == 1
    assert "tierplane up --example laptop" in nothing.stderr
    assert "there is no example" in installed.run("up", "--example", "none").stderr
    missing = installed.run("validate", "none.yaml")
    assert "tierplane init" in missing.stderr
    assert "pip install 'tierplane[llamacpp]'" in installed.run("init", "hints.yaml").stdout
    code = "from controlplane.paths import install_command; print(install_command('gpu'))"
    hint = subprocess.run(
        [installed.python, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=installed.folder
    )
    assert hint.stdout.strip() == "pip install 'tierplane[gpu]'"


def test_a_plane_from_the_wheel_in_an_empty_folder(installed: Installation) -> None:
    assert installed.run("init", "plane.yaml", "--example", "simulated").returncode == 0
    file = installed.folder / "plane.yaml"
    port = free_port()
    text = (
        file.read_text().replace("port: 8080", f"port: {port}").replace("port: 8000", f"port: {free_port()}")
    )
    file.write_text(text)
    up = installed.run("up", "plane.yaml", "--detach", "--timeout", "150")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        body = {"model": "balanced", "messages": [{"role": "user", "content": "hello"}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["choices"][0]["message"]["content"]
    finally:
        down = installed.run("down")
    assert "none left" in down.stdout + down.stderr
