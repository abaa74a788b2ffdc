from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.engines import ENGINES, engine_for
from controlplane.engines.base import Launch
from controlplane.engines.vllm import VllmEngine, _cpu_environment, flags

ENGINE = VllmEngine()


def tier(**settings: Any) -> TierConfig:
    return TierConfig(**{"name": "small", "model": "org/model", **settings})


def launch(model: str = "org/model", gpu_ids: tuple[str, ...] = ()) -> Launch:
    return Launch("127.0.0.1", 4000, "s3cret", model, gpu_ids)


def after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_every_kind_has_its_engine_and_importing_them_is_light() -> None:
    assert {kind: engine.kind for kind, engine in ENGINES.items()} == {kind: kind for kind in ENGINES}
    assert engine_for(tier()) is ENGINES["vllm"]
    script = (
        "import controlplane.engines.supervision.supervisor, sys; "
        "print([m for m in ('torch', 'vllm', 'ray', 'xllamacpp', 'uvloop') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line() -> None:
    command = ENGINE.command(
        tier(
            tensor_parallel_size=2,
            pipeline_parallel_size=3,
            engine_args={"max-model-len": 4096, "quantization": "awq"},
        ),
        launch(),
    )
    argv = list(command.argv)
    assert argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert after(argv, "--host") == "127.0.0.1"
    assert after(argv, "--port") == "4000"
    assert after(argv, "--model") == "org/model"
    assert after(argv, "--served-model-name") == "model"
    assert after(argv, "--tensor-parallel-size") == "2"
    assert after(argv, "--pipeline-parallel-size") == "3"
    assert argv[-2:] == ["--max-model-len=4096", "--quantization=awq"]
    assert "--trust-remote-code" not in argv
    assert "--dtype=float32" not in argv


def test_clients_can_not_make_an_engine_fetch_any_address() -> None:
    command = ENGINE.command(tier(), launch())
    assert after(list(command.argv), "--allowed-media-domains") == "none.invalid"
    assert command.env["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    allowed = tier(engine_args={"allowed-media-domains": ["images.example"]})
    assert after(list(ENGINE.command(allowed, launch()).argv), "--allowed-media-domains") == "images.example"
    every = tier(engine_args={"allowed-media-domains": None})
    assert "--allowed-media-domains" not in ENGINE.command(every, launch()).argv


def test_the_secret_is_in_the_environment_only() -> None:
    command = ENGINE.command(tier(), launch())
    assert command.env["VLLM_API_KEY"] == "s3cret"
    assert not any("s3cret" in word for word in command.argv)
    assert "s3cret" not in repr(command)
    assert "s3cret" not in repr(launch())


@pytest.mark.parametrize(
    ("engine_args", "argv"),
    [
        ({"enforce-eager": True}, ["--enforce-eager"]),
        ({"enable-prefix-caching": False}, ["--no-enable-prefix-caching"]),
        ({"disable-log-stats": False}, []),
        ({"seed": None}, []),
        ({"seed": 0}, ["--seed=0"]),
        ({"gpu-memory-utilization": 0.5}, ["--gpu-memory-utilization=0.5"]),
        ({"lora-modules": ["a=1", "b=2"]}, ["--lora-modules", "a=1", "b=2"]),
        ({"chat-template": "--odd"}, ["--chat-template=--odd"]),
        (
            {"structured-outputs-config": '{"backend":"xgrammar"}'},
            ['--structured-outputs-config={"backend":"xgrammar"}'],
        ),
    ],
)
def test_engine_arguments_become_flags(engine_args: dict[str, Any], argv: list[str]) -> None:
    assert flags(engine_args) == argv


def test_on_cpu_float32_and_eager_unless_named() -> None:
    argv = ENGINE.command(tier(device="cpu"), launch()).argv
    assert "--dtype=float32" in argv
    assert "--enforce-eager" in argv
    named = tier(device="cpu", engine_args={"dtype": "bfloat16", "enforce-eager": False})
    argv = ENGINE.command(named, launch()).argv
    assert "--dtype=bfloat16" in argv
    assert "--no-enforce-eager" in argv
    assert "--enforce-eager" not in argv


def test_a_pipeline_on_several_nodes_uses_ray_unless_another_executor_is_named() -> None:
    wide = {"pipeline_parallel_size": 2, "pipeline_across_nodes": True}
    assert "--distributed-executor-backend=ray" in ENGINE.command(tier(**wide), launch()).argv
    own = tier(**wide, engine_args={"distributed-executor-backend": "mp", "nnodes": 2})
    assert "--distributed-executor-backend=mp" in ENGINE.command(own, launch()).argv
    on_one_node = ENGINE.command(tier(pipeline_parallel_size=2), launch()).argv
    assert not any("executor" in word for word in on_one_node)


def test_gpus_are_named_in_the_environment() -> None:
    env = ENGINE.command(tier(), launch(gpu_ids=("GPU-a", "GPU-b"))).env
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert "CUDA_VISIBLE_DEVICES" not in ENGINE.command(tier(), launch()).env


def test_a_local_model_never_asks_the_hub(tmp_path: Path) -> None:
    assert ENGINE.command(tier(), launch(str(tmp_path))).env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in ENGINE.command(tier(), launch()).env


@pytest.mark.parametrize(
    ("world_size", "cores", "env"),
    [
        (
            1,
            2,
            {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            },
        ),
        (1, 32, {}),
        (3, 2, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}),
        (2, 33, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "16"}),
    ],
)
def test_threads_on_cpu(
    monkeypatch: pytest.MonkeyPatch, world_size: int, cores: int, env: dict[str, str]
) -> None:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert _cpu_environment(world_size, cores) == {"VLLM_CPU_KVCACHE_SPACE": "1", **env}


@pytest.mark.parametrize(
    ("world_size", "cores", "uni"), [(1, 2, True), (1, 4, True), (1, 32, False), (3, 2, False)]
)
def test_an_unbound_worker_shares_the_engine_cores_process(
    monkeypatch: pytest.MonkeyPatch, world_size: int, cores: int, uni: bool
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    command = ENGINE.command(tier(device="cpu", tensor_parallel_size=world_size), launch())
    assert ("--distributed-executor-backend=uni" in command.argv) == uni
    assert ("VLLM_ENABLE_V1_MULTIPROCESSING" in command.env) == uni


def test_what_the_environment_or_the_tier_sets_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert _cpu_environment(1, 2) == {}
    env = ENGINE.command(tier(device="cpu", env={"VLLM_CPU_KVCACHE_SPACE": "9"}), launch()).env
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "9"


def test_a_pooling_model_embeds_and_does_not_generate() -> None:
    pooling = ENGINE.capabilities(tier(engine_args={"runner": "pooling"}))
    assert (pooling.embeddings, pooling.resume_by_token_ids) == (True, False)
    generating = ENGINE.capabilities(tier())
    assert (generating.embeddings, generating.resume_by_token_ids) == (False, True)


# Lines as vLLM 0.32 wrote them.
@pytest.mark.parametrize(
    ("line", "phase"),
    [
        (
            "(APIServer pid=1) INFO 11-22 18:07:03 [api_utils.py:286] non-default args: {'model': 'm'}",
            "reading the model's config",
        ),
        (
            "(APIServer pid=1) INFO 11-22 18:07:17 [model.py:733] Resolved architecture: LlamaForCausalLM",
            "resolving LlamaForCausalLM",
        ),
        (
            "(APIServer pid=1) WARNING [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs",
            None,
        ),
        (
            "(EngineCore pid=2) INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config",
            "starting workers",
        ),
        ("(Worker pid=3) INFO [cpu_model_runner.py:68] Starting to load model /m...", "loading weights"),
        (
            "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:03<00:00,  3.42s/it]",
            "loading weights, 50%",
        ),
        ("(Worker pid=3) INFO [default_loader.py:501] Loading weights took 3.42 seconds", "profiling memory"),
        ("(EngineCore pid=2) INFO [kv_cache_utils.py:2327] CPU KV cache size: 23,296 tokens", "warming up"),
        (
            "(APIServer pid=1) INFO [entry.py:140] Starting vLLM server on http://127.0.0.1:1",
            "starting the server",
        ),
        ("INFO:     Application startup complete.", "ready"),
        ('INFO:     127.0.0.1:53326 - "GET /health HTTP/1.1" 200 OK', None),
    ],
)
def test_phases(line: str, phase: str | None) -> None:
    assert ENGINE.phase(line) == phase


@pytest.mark.parametrize(
    ("lines", "exit_code", "expected", "permanent"),
    [
        (
            ["api_server.py: error: unrecognized arguments: --bogus-flag"],
            2,
            "does not know --bogus-flag",
            True,
        ),
        (
            ["api_server.py: error: argument --dtype: invalid choice: 'foo' (choose from 'auto', 'half')"],
            2,
            "argument --dtype: invalid choice: 'foo'",
            True,
        ),
        (
            ["huggingface_hub.errors.HFValidationError: Repo id must be in the form 'a/b': '/nope/x'."],
            1,
            "must be a hub id or an existing local folder",
            True,
        ),
        (
            ["huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot"],
            1,
            "HF_HUB_OFFLINE",
            True,
        ),
        (
            ["2. Specify a local directory that contains a recognized configuration file."],
            1,
            "config.json",
            True,
        ),
        (
            ["  Value error, User-specified max_model_len (99999) is greater than the derived max_model_len"],
            1,
            "max-model-len 99999",
            True,
        ),
        (
            ["Total number of attention heads (9) must be divisible by tensor parallel size (2)"],
            1,
            "divides the model's heads",
            True,
        ),
        (
            ["ValueError: Model architectures ['FooForCausalLM'] are not supported for now."],
            1,
            "FooForCausalLM",
            True,
        ),
        (["ModuleNotFoundError: No module named 'vllm'"], 1, "vllm is missing", True),
        (
            ["ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"],
            1,
            "raise gpu-memory-utilization",
            True,
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."],
            1,
            "GPU memory ran out",
            False,
        ),
        (
            ["ValueError: Free memory on device cuda:0 (3/80 GiB) on startup is less than desired"],
            1,
            "another process uses memory",
            False,
        ),
        (
            ["RuntimeError: [enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate"],
            1,
            "VLLM_CPU_KVCACHE_SPACE",
            False,
        ),
        (["INFO all is well"], -9, "killed by SIGKILL, probably because memory ran out", False),
        (["OSError: [Errno 98] Address already in use"], 1, "the port was taken by another process", False),
        (
            [
                "Traceback (most recent call last):",
                "(EngineCore pid=2) ERROR 11-22 18:07:03 [a:1] ValueError: odd",
            ],
            1,
            "vLLM exited with code 1: ValueError: odd",
            False,
        ),
        (
            ["  Value error, invalid literal for int() with base 10: 'x' [type=value_error, x=A()]"],
            1,
            "vLLM rejects its settings: invalid literal for int() with base 10: 'x'; correct",
            True,
        ),
        (
            [
                "RuntimeError: Worker failed with error 'Available memory on node 0 (1/2 GiB) on kv cache "
                "allocation is less than requested memory for kv (100.0 GiB).'"
            ],
            1,
            "lower VLLM_CPU_KVCACHE_SPACE",
            False,
        ),
        ([], 1, "vLLM exited with code 1", False),
        (["INFO loading"], -11, "vLLM was killed by SIGSEGV", False),
    ],
)
def test_diagnoses(lines: list[str], exit_code: int, expected: str, permanent: bool) -> None:
    diagnosis = ENGINE.diagnose(lines, exit_code)
    assert expected in diagnosis.summary
    assert diagnosis.permanent is permanent
    assert diagnosis.last_lines == tuple(lines)


def test_a_cause_outlives_the_noise_after_it() -> None:
    lines = [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "nanobind: leaked 64 types!",
    ]
    assert "GPU memory ran out" in ENGINE.diagnose(lines, 1).summary


def test_output_that_only_names_the_environment_variable_is_no_cause() -> None:
    lines = [
        "WARNING VLLM_CPU_KVCACHE_SPACE not set. Using 4 GiB by default.",
        "RuntimeError: something else",
    ]
    assert "something else" in ENGINE.diagnose(lines, 1).summary


@pytest.mark.vllm
def test_the_installed_vllm_knows_every_flag_that_is_always_given() -> None:
    parser = (
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P\n"
        "try:\n    from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "except ImportError:\n    from vllm.entrypoints.openai.cli_args import make_arg_parser\n"
        "import sys; print(make_arg_parser(P()).parse_args(sys.argv[1:]).enforce_eager)"
    )
    cpu = tier(device="cpu", trust_remote_code=True, engine_args={"enable-prefix-caching": False})
    argv = ENGINE.command(cpu, launch()).argv[3:]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", parser, *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.stdout.strip().endswith("True"), done.stderr[-2000:]
