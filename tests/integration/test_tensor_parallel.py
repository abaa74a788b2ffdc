"""Tensor parallelism for real: one engine of three workers. Alone, since memory is short beside others."""

from __future__ import annotations

import psutil
import pytest

from tests.support.openai_client import FACT, QUESTION, client
from tests.support.plane import running

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]


def test_tensor_parallelism_for_real() -> None:
    """The model has 9 heads and 3 KV heads: three workers, the same answer."""
    tier = {
        "name": "parallel",
        "model": "bundled:smollm2-135m",
        "engine": "vllm",
        "device": "cpu",
        "tensor_parallel_size": 3,
        "engine_args": {"max-model-len": 1024, "max-num-seqs": 2},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1|1"},
    }
    with running({"tiers": [tier]}) as started, client(started.url) as openai:
        answer = openai.chat.completions.create(model="parallel", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == FACT
        pid = started.ready("parallel")[0]["pid"]
        names = [" ".join([p.name(), *p.cmdline()]) for p in psutil.Process(pid).children(recursive=True)]
        # What is there instead, and whether the engine has failed meanwhile.
        seen = (pid, names, started.endpoints("parallel"))
        assert len([name for name in names if "Worker" in name]) == 3, seen
