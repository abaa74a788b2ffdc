"""What an engine process gets of its supervisor's environment.

An engine runs model code. It gets what programs, accelerators and model libraries need and nothing else: not
Ray's token, the keys of other tiers, or the secrets of webhooks. A tier's ``pass_env`` names further
variables, and ``env`` sets them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

_NAMES = """
PATH HOME USER LOGNAME SHELL HOSTNAME PWD TZ TERM LANG LANGUAGE TMPDIR TMP TEMP
VIRTUAL_ENV SPT_NOENV DO_NOT_TRACK NO_COLOR
LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH CC CXX CUDAHOSTCXX
HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy
SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
TIERPLANE_PLANE_ID TIERPLANE_RUN_DIR TIERPLANE_CACHE_DIR
"""
_PREFIXES = """
LC_ XDG_ PYTHON CONDA_
CUDA NVIDIA_ NCCL_ CUBLAS_ CUDNN_ CUTE_ CUTLASS_ GPU_ HIP_ ROCM_ ROCR_ HSA_ AMD_ MIOPEN_
GLOO_ UCX_ NVSHMEM_ FI_ OMPI_
OMP_ KMP_ GOMP_ MKL_ OPENBLAS_ BLIS_ NUMEXPR_ NUMBA_ DNNL_ ONEDNN_ MALLOC_ GLIBC_ TCMALLOC_ JEMALLOC_
TORCH PYTORCH_ TRITON_ INDUCTOR_ FLASHINFER_ FLASH_ATTENTION_
VLLM_ HF_ HUGGING_FACE_ HUGGINGFACE_ TRANSFORMERS_ TOKENIZERS_ SAFETENSORS_ MODELSCOPE_ GGML_ LLAMA_ RAYON_
"""
PASSED: Final = frozenset(_NAMES.split())
PASSED_PREFIXES: Final = tuple(_PREFIXES.split())


def engine_environment(environment: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, str]:
    """The variables of ``environment`` that an engine process gets; ``also`` names further ones."""
    named = {*PASSED, *also}
    return {
        name: value
        for name, value in environment.items()
        if name in named or name.startswith(PASSED_PREFIXES)
    }
