"""Loads the architecture of a model from a folder, a GGUF file, a hub id or the name of a bundled model.

A hub id is looked up in the local hub cache, then in the table of well-known models, then on the hub (only
``config.json``, and only if ``HF_HUB_OFFLINE`` is not set). No weights are downloaded, and no code from the
model's repository is run.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlplane.config import BUNDLED_PREFIX
from controlplane.core.sizing.architecture import LayerKind, ModelSpec, Moe
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.hf_config import parse_config
from controlplane.core.sizing.quantization import Quantization, Scheme
from controlplane.core.sizing.weights import MemoryTerm, stages, weight_terms
from controlplane.errors import SetupError
from controlplane.models.catalog import BUNDLED_NAMES, config_defaults, known_model
from controlplane.models.weight_files import GgufFile, StoredTensor, read_gguf, safetensors_tensors

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model's architecture, and the sizes that its files state."""

    spec: ModelSpec
    where: str
    """The source of the architecture, for reports."""
    stored_bytes: int = 0
    """Size of the tensors in the checkpoint's headers that the engine loads; 0 if no weights are on this
    machine."""
    checks: tuple[str, ...] = ()
    """Texts that compare the sizes in the headers with those computed from the configuration."""
    extra: MemoryTerm | None = None
    """Weights in the checkpoint that the configuration doesn't explain; None if there are none."""


def load_model(source: str) -> LoadedModel:
    """The architecture of a model. SetupError with the remedy if it can't be found or read."""
    if source.startswith(BUNDLED_PREFIX):
        name = BUNDLED_NAMES.get(source.removeprefix(BUNDLED_PREFIX), "")
        spec = known_model(name) if name else None
        if spec is None:
            raise SetupError(f"no bundled model '{source}': there is {', '.join(BUNDLED_NAMES)}")
        return LoadedModel(spec, "the table of well-known models")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        return _from_folder(path)
    if source.startswith(("/", "./", "../", "~")):
        raise SetupError(f"'{source}' is neither a folder nor a GGUF file: check the path")
    cached = hub_cache_folder(source)
    if cached is not None:
        return replace(_from_folder(cached, source), where="the local hub cache")
    spec = known_model(source)
    if spec is not None:
        return LoadedModel(spec, "the table of well-known models")
    if _HUB_ID.match(source):
        return LoadedModel(_spec(_fetch_config(source), source), "config.json on the model hub")
    raise SetupError(
        f"'{source}' is not a folder, a GGUF file, a hub id (owner/name) or a name in the table of "
        "well-known models: give a path or a hub id"
    )


def hub_cache_folder(hub_id: str) -> Path | None:
    """The snapshot of a hub id in the local cache: that of ``main``, else the newest one; None if there is
    none."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = root / f"models--{hub_id.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file():
        snapshot = folder / "snapshots" / main.read_text().strip()
        if (snapshot / "config.json").is_file():
            return snapshot
    snapshots = [path for path in folder.glob("snapshots/*") if (path / "config.json").is_file()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _from_folder(folder: Path, name: str = "") -> LoadedModel:
    file = folder / "config.json"
    if not file.is_file():
        gguf = sorted(folder.glob("*.gguf"))
        if gguf:
            return _from_gguf(gguf[0])
        raise SetupError(f"{folder} has no config.json and no GGUF file: give a model's folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SetupError(f"{file} is not valid JSON ({error}): download it again") from error
    spec = _spec(_with_quantization(config, folder), name or folder.name)
    # Sharded checkpoints list their files; engines load no others from the folder.
    index = folder / "model.safetensors.index.json"
    paths = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        listed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        paths = [path for path in paths if path.name in listed]
    if not paths:
        return LoadedModel(spec, f"{file}")
    return _checked(spec, _loaded_tensors(spec, safetensors_tensors(paths)), str(file))


def _with_quantization(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The configuration with that of NVIDIA's ModelOpt, which older checkpoints have in a file of its own."""
    file = folder / "hf_quant_config.json"
    if not isinstance(config, Mapping) or config.get("quantization_config") or not file.is_file():
        return config
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{file} is not valid JSON ({error}): download it again") from error
    return {**config, "quantization_config": {"quant_method": "modelopt", **found}}


def _spec(config: Mapping[str, Any], name: str) -> ModelSpec:
    try:
        return parse_config(config, name, config_defaults())
    except (ValueError, TypeError, OverflowError) as error:
        raise SetupError(f"the configuration of '{name}' can't be used: {error}") from error


def _loaded_tensors(spec: ModelSpec, tensors: tuple[StoredTensor, ...]) -> list[StoredTensor]:
    """The tensors that the engine loads: all except a tied head, rotary buffers, and layers past the last
    one."""
    loaded = []
    for tensor in tensors:
        layer = _LAYER.search(tensor.name)
        if layer and int(layer[1]) >= len(spec.layers):
            continue
        if tensor.name.endswith("rotary_emb.inv_freq") or (spec.tied and "lm_head" in tensor.name):
            continue
        loaded.append(tensor)
    return loaded


def _checked(spec: ModelSpec, tensors: list[StoredTensor], where: str) -> LoadedModel:
    """Compare the sizes in the headers with the formula's; a surplus becomes :attr:`LoadedModel.extra`."""
    elements = sum(tensor.elements for tensor in tensors)
    size = sum(tensor.size_bytes for tensor in tensors)
    if spec.quantization.quantized:
        expected = _formula_bytes(spec)
        unit, found = "bytes", size
        surplus = size - expected
    else:
        expected, unit, found = spec.params, "parameters", elements
        surplus = (elements - expected) * (size // elements if elements else 2)
    difference = (found - expected) / expected
    verdict = "as the formula gives" if found == expected else f"{difference:+.2%} against the formula"
    checks = [f"the checkpoint's headers hold {found:,} {unit}, {verdict}"]
    extra = None
    if difference > 0.002:
        extra = MemoryTerm(
            "weights: other parts", surplus, "in the checkpoint's headers, not explained by config"
        )
    elif difference < -0.02:
        checks.append("the checkpoint holds less than its config describes: is it complete?")
    return LoadedModel(spec, where, size, tuple(checks), extra)


def _formula_bytes(spec: ModelSpec) -> int:
    (stage,) = stages(spec, 1)
    terms = weight_terms(spec, EngineArgs(), stage, "bfloat16")
    return sum(term.size_bytes for term in terms if term.name.startswith("weights"))


def _from_gguf(path: Path) -> LoadedModel:
    gguf = read_gguf(path)
    spec = gguf_spec(gguf, path.name)
    elements = sum(tensor.elements for tensor in gguf.tensors)
    checks = (f"the header lists {elements:,} parameters in {gguf.size_bytes:,} bytes",)
    return LoadedModel(spec, str(path), gguf.size_bytes, checks)


def gguf_spec(gguf: GgufFile, name: str) -> ModelSpec:
    """The architecture that a GGUF header describes. SetupError if a required field is missing."""
    data = gguf.metadata
    arch = str(data.get("general.architecture", ""))

    def number(field: str, default: int | None = None) -> int:
        value = data.get(f"{arch}.{field}", default)
        if not isinstance(value, int) or value < 1:
            raise SetupError(f"the GGUF file '{name}' has no usable value for '{arch}.{field}'")
        return value

    heads = number("attention.head_count")
    hidden = number("embedding_length")
    experts = int(data.get(f"{arch}.expert_count") or 0)
    common = Counter[str]()
    for tensor in gguf.tensors:
        common[tensor.dtype] += tensor.elements
    names = {tensor.name for tensor in gguf.tensors}
    intermediate = number("feed_forward_length", 4 * hidden)
    moe = None
    if experts > 1:
        moe = Moe(experts, number("expert_used_count", 2), number("expert_feed_forward_length", intermediate))
    return ModelSpec(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads),
        intermediate=intermediate,
        vocab=number("vocab_size", int(data.get("tokenizer.ggml.tokens") or 32000)),
        layers=(LayerKind(moe=moe is not None),) * number("block_count"),
        max_length=number("context_length", 2048),
        tied="output.weight" not in names,
        dtype="float16",
        qk_norm="blk.0.attn_q_norm.weight" in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        moe=moe,
        quantization=Quantization(Scheme.GGUF, bits=0, gguf_type=common.most_common(1)[0][0], lm_head=True),
    )


def _fetch_config(hub_id: str) -> dict[str, Any]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise SetupError(
            f"'{hub_id}' is neither in the local hub cache nor in the table of well-known models, and "
            "HF_HUB_OFFLINE is set: unset it, or give a folder"
        )
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("https://", "http://")):
        raise SetupError(f"HF_ENDPOINT '{endpoint}' is not an http or https URL: correct or unset it")
    request = urllib.request.Request(f"{endpoint.rstrip('/')}/{hub_id}/resolve/main/config.json")  # noqa: S310
    token = os.environ.get("HF_TOKEN")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as response:  # noqa: S310
            config = json.load(response)
    except (OSError, ValueError) as error:
        status = error.code if isinstance(error, urllib.error.HTTPError) else 0
        why = {
            401: "it needs a token: set HF_TOKEN",
            403: "this token has no access to it: request access on the hub",
            404: "there is no such model",
        }.get(status, "the hub can't be reached: give a folder, or plain numbers (--params, --layers, …)")
        raise SetupError(f"no configuration of '{hub_id}': {why}") from error
    if not isinstance(config, dict):
        raise SetupError(f"the hub's config.json of '{hub_id}' is not a JSON object")
    return config
