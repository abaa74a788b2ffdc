from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.engines.base import Launch
from controlplane.engines.llamacpp import KEY_ENV, LlamaCppEngine
from controlplane.engines.llamacpp_server import UnusableSettings, apply, gguf_file

ENGINE = LlamaCppEngine()


def tier(**settings: Any) -> TierConfig:
    return TierConfig(**{"name": "small", "engine": "llamacpp", "model": "/m.gguf", **settings})


def params_of(**settings: Any) -> Any:
    """The ``--params`` of the command line, decoded."""
    argv = ENGINE.command(tier(**settings), Launch("127.0.0.1", 4000, "s3cret", "/m.gguf")).argv
    return json.loads(argv[argv.index("--params") + 1])


def test_the_secret_is_in_the_environment_only() -> None:
    command = ENGINE.command(tier(), Launch("127.0.0.1", 4000, "s3cret", "/m.gguf"))
    assert command.env[KEY_ENV] == "s3cret"
    assert not any("s3cret" in word for word in command.argv)


def test_slots_follow_the_concurrency_limit_unless_named() -> None:
    assert params_of()["parallel"] == 4
    assert params_of(concurrency_limit=2)["parallel"] == 2
    assert params_of(engine_args={"parallel": 7})["parallel"] == 7
    assert params_of(engine_args={"n-parallel": 7}) == {"n-parallel": 7}


def test_threads_are_the_share_of_the_cores_unless_named() -> None:
    def threads(cores: int, **engine_args: Any) -> Any:
        launch = Launch("127.0.0.1", 4000, "s3cret", "/m.gguf", cores=cores)
        argv = ENGINE.command(tier(engine_args=engine_args), launch).argv
        return json.loads(argv[argv.index("--params") + 1]).get("threads")

    assert threads(3) == 3
    assert threads(3, threads=2) == 2
    assert threads(0) is None


class Params(SimpleNamespace):
    """Fields like llama.cpp's, as strict about their kinds as the binding."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and type(value) is not type(getattr(self, name)):
            raise TypeError(name)
        super().__setattr__(name, value)


def params() -> Params:
    return Params(n_ctx=0, port=0, use_jinja=True, cpuparams=Params(n_threads=-1), sampling=Params(temp=0.8))


def test_names_of_the_command_line_and_of_the_fields_both_work() -> None:
    target = params()
    engine_args = {"ctx-size": 2048, "threads": 2, "temp": 0.1, "use-jinja": False, "n-ctx": None}
    apply(target, engine_args)
    assert (target.n_ctx, target.cpuparams.n_threads) == (2048, 2)
    assert (target.sampling.temp, target.use_jinja) == (0.1, False)


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        ({"bogus": 1}, "engine_args.bogus is unknown to llama.cpp: use one of ctx-size"),
        ({"ctx-size": "big"}, "engine_args.ctx-size can't be 'big': llama.cpp needs a value of type int"),
        ({"port": 1}, "engine_args.port is set by tierplane: remove it"),
        ({"--class--": 1}, "unknown"),
    ],
)
def test_wrong_arguments_are_named(engine_args: dict[str, Any], expected: str) -> None:
    with pytest.raises(UnusableSettings) as caught:
        apply(params(), engine_args)
    assert expected in str(caught.value)


def test_every_alias_is_a_field_of_the_installed_llamacpp() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    from controlplane.engines.llamacpp import ALIASES

    for name in ALIASES:
        target = xllamacpp.CommonParams()
        *parents, field = ALIASES[name].split(".")
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, field), name


def test_the_model_is_a_file_or_the_only_one_in_a_folder(tmp_path: Path) -> None:
    one = tmp_path / "one.gguf"
    one.touch()
    assert gguf_file(str(one)) == one
    assert gguf_file(str(tmp_path)) == one
    (tmp_path / "one.gguf").unlink()
    for part in ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        (tmp_path / part).touch()
    assert gguf_file(str(tmp_path)).name == "big-00001-of-00002.gguf"
    one.touch()
    with pytest.raises(UnusableSettings, match=r"contains big-00001-of-00002.gguf, one.gguf: name the file"):
        gguf_file(str(tmp_path))
    with pytest.raises(UnusableSettings, match=r"no model at"):
        gguf_file(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("lines", "exit_code", "expected", "permanent"),
    [
        (["tierplane: no model at '/x'"], 2, "no model at '/x'", True),
        (
            ["E gguf_init_from_reader: invalid magic characters: '{?', expected 'GGUF'"],
            1,
            "not a valid GGUF file",
            True,
        ),
        (["error loading model: unknown model architecture: 'foo'"], 1, "architecture 'foo'", True),
        (
            ["ggml_aligned_malloc: insufficient memory (attempted to allocate 9 MB)"],
            1,
            "memory ran out",
            False,
        ),
        ([], -9, "memory ran out", False),
        (["OSError: [Errno 98] Address already in use"], 1, "the port was taken by another process", False),
        (["RuntimeError: llama.cpp could not start: odd"], 1, "could not start: odd", False),
    ],
)
def test_diagnoses(lines: list[str], exit_code: int, expected: str, permanent: bool) -> None:
    diagnosis = ENGINE.diagnose(lines, exit_code)
    assert expected in diagnosis.summary
    assert diagnosis.permanent is permanent


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("0.00.009.815 I srv    load_model: loading model '/m.gguf'", "loading weights"),
        ("0.00.800.476 I srv    load_model: initializing, n_slots = 2, n_ctx_slot = 2048", "creating slots"),
        ("0.00.805.454 I srv          init: listening on http://127.0.0.1:18003", "ready"),
        ("0.06.310.083 I slot print_timing: id  1", None),
    ],
)
def test_phases(line: str, phase: str | None) -> None:
    assert ENGINE.phase(line) == phase


@pytest.mark.parametrize(
    ("args", "sees", "tools"),
    [
        ({}, False, True),
        ({"mmproj": "/models/mmproj.gguf"}, True, True),
        ({"mmproj": ""}, False, True),
        ({"jinja": False}, False, False),
    ],
)
def test_without_a_projector_it_takes_no_images(args: dict[str, Any], sees: bool, tools: bool) -> None:
    tier = TierConfig.model_validate({"name": "small", "engine": "llamacpp", "model": "/m.gguf"})
    found = ENGINE.capabilities(tier.model_copy(update={"engine_args": args}))
    assert (found.images, found.audio, found.video, found.tools) == (sees, sees, False, tools)
