"""Models from folders, headers, GGUF files, the hub cache and a hub (a local server)."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controlplane.core.sizing.quantization import gguf_bytes
from controlplane.errors import SetupError
from controlplane.models.model_config import load_model
from controlplane.models.weight_files import StoredTensor, read_gguf, safetensors_tensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
    "mlp.gate_proj.weight": (128, 64),
    "mlp.up_proj.weight": (128, 64),
    "mlp.down_proj.weight": (64, 128),
    "input_layernorm.weight": (64,),
    "post_attention_layernorm.weight": (64,),
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    return found


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = 2
        for width in shape:
            size *= width
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(offset))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(root / "model.safetensors", shapes())
    return root


def test_headers_agree_with_the_formula(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert loaded.stored_bytes == loaded.spec.params * 2
    assert "as the formula gives" in loaded.checks[0]
    assert loaded.extra is None


def test_tensors_that_the_engine_does_not_load_are_not_counted(folder: Path) -> None:
    more = {
        "lm_head.weight": (256, 64),
        "model.layers.2.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
    }
    write_safetensors(folder / "model.safetensors", {**shapes(), **more})
    loaded = load_model(str(folder))
    assert loaded.stored_bytes == loaded.spec.params * 2


def test_tensors_that_the_config_does_not_explain_become_a_term(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {**shapes(), "vision_tower.weight": (1000, 64)})
    loaded = load_model(str(folder))
    assert loaded.extra is not None
    assert loaded.extra.size_bytes == 64000 * 2


def test_an_incomplete_checkpoint_is_reported(folder: Path) -> None:
    tensors = shapes()
    del tensors["model.embed_tokens.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    assert "is it complete?" in load_model(str(folder)).checks[1]


def test_only_files_in_the_index_count(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(shapes(), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(folder / "consolidated.safetensors", shapes())
    loaded = load_model(str(folder))
    assert loaded.stored_bytes == loaded.spec.params * 2


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, struct.pack("<Q", 1 << 40), struct.pack("<Q", 4) + b"nope"]
)
def test_a_broken_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"broken\.safetensors"):
        safetensors_tensors([path])


def test_a_truncated_safetensors_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SetupError, match=r"model\.safetensors .*download it again"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("dtype", "size_bytes"), [("BOOL", 6), ("F8_E4M3", 6), ("BF16", 12), ("F32", 24), ("I64", 48), ("F4", 3)]
)
def test_bytes_of_stored_types(tmp_path: Path, dtype: str, size_bytes: int) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [3, 2], "data_offsets": [0, size_bytes]}}).encode()
    path = tmp_path / "one.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size_bytes))
    assert safetensors_tensors([path]) == (StoredTensor("x", dtype, 6, size_bytes),)


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_gguf(path: Path, *, drop: str = "") -> int:
    """A GGUF header of a model like CONFIG with Q4_0 matrices; returns the bytes of its tensors."""
    numbers = {
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 512,
    }
    numbers.pop(drop, None)
    pairs = [gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama")]
    pairs += [gguf_string(key) + struct.pack("<II", 4, value) for key, value in numbers.items()]
    tokens = b"".join(gguf_string(f"t{i}") for i in range(256))
    pairs.append(gguf_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 256) + tokens)
    pairs.append(gguf_string("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 256) + bytes(1024))
    tensors, size = [], 0
    for name, shape in shapes().items():
        kind, dtype = (2, "Q4_0") if len(shape) == 2 else (0, "F32")
        elements = shape[0] * (shape[1] if len(shape) == 2 else 1)
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        tensors.append(
            gguf_string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, size)
        )
        size += gguf_bytes(elements, dtype)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    path.write_bytes(head + b"".join(pairs) + b"".join(tensors))
    return size


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    size = write_gguf(path)
    assert read_gguf(path).size_bytes == size
    for source in (path, tmp_path):
        loaded = load_model(str(source))
        assert loaded.stored_bytes == size
        assert f"lists {loaded.spec.params:,} parameters" in loaded.checks[0]
        assert loaded.spec.quantization.gguf_type == "Q4_0"
        assert (loaded.spec.vocab, loaded.spec.kv_heads, loaded.spec.tied) == (256, 2, True)


def test_gguf_headers_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("llama.flag", True)
    writer.add_array("llama.nested", [[1, 2], [3, 4]])
    writer.add_token_list(["a", "b", "ä"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("plain", np.zeros((3, 5), np.float32))
    writer.add_tensor("packed", np.zeros((4, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs, ours = gguf.GGUFReader(path), read_gguf(path)
    assert ours.tensors == tuple(
        StoredTensor(tensor.name, tensor.tensor_type.name, int(tensor.n_elements), int(tensor.n_bytes))
        for tensor in theirs.tensors
    )
    assert ours.metadata == {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.flag": True,
        "llama.nested": 2,
        "tokenizer.ggml.tokens": 3,
        "tokenizer.ggml.scores": 3,
    }


def test_a_gguf_without_a_needed_field(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(path, drop="llama.block_count")
    with pytest.raises(SetupError, match="block_count"):
        load_model(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"GGML", b"GGUF\x63\x00\x00\x00", b"GGUF" + struct.pack("<IQQ", 3, 1, 0)]
)
def test_a_broken_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"broken\.gguf"):
        read_gguf(path)


def test_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--me--mine"
    for revision, layers in (("aaa", 2), ("bbb", 3)):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa")
    loaded = load_model("me/mine")
    assert (loaded.spec.name, len(loaded.spec.layers)) == ("me/mine", 2)
    assert "cache" in loaded.where


class Hub(BaseHTTPRequestHandler):
    """A hub with one open and one gated model."""

    def do_GET(self) -> None:
        status, body = 404, b""
        if self.path == "/me/open/resolve/main/config.json":
            status, body = 200, json.dumps(CONFIG).encode()
        elif self.path == "/me/gated/resolve/main/config.json":
            allowed = self.headers.get("Authorization") == "Bearer secret"
            status, body = (200, json.dumps(CONFIG).encode()) if allowed else (401, b"")
        elif self.path.startswith("/me/odd/"):
            status, body = 200, b"[]"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model("me/open").where == "config.json on the model hub"
    with pytest.raises(SetupError, match="HF_TOKEN"):
        load_model("me/gated")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert load_model("me/gated").spec.hidden == 64
    with pytest.raises(SetupError, match="no such model"):
        load_model("me/none")
    with pytest.raises(SetupError, match="JSON object"):
        load_model("me/odd")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SetupError, match="can't be reached"):
        load_model("me/open")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SetupError, match="HF_HUB_OFFLINE"):
        load_model("me/open")


def test_an_unknown_model_source_is_refused_with_a_remedy(tmp_path: Path) -> None:
    for source, words in (
        ("/no/such/folder", "check the path"),
        ("what is this", "give a path or a hub id"),
        (str(tmp_path), "no config.json"),
        ("bundled:nothing", "smollm2-135m"),
    ):
        with pytest.raises(SetupError, match=words):
            load_model(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SetupError, match="download it again"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SetupError, match="num_hidden_layers"):
        load_model(str(tmp_path))


def test_the_bundled_model() -> None:
    assert load_model("bundled:smollm2-135m").spec.params == 134_515_008
