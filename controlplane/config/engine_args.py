"""Names of engines' flags in ``engine_args``."""

from __future__ import annotations

import re
from typing import Any

from controlplane.config.strict import ConfigFinding, FindingsError

_FLAG = re.compile(r"^[a-z][a-z0-9-]*$")
_SET_BY_TIERPLANE = {
    "model": "use the tier's 'model'",
    "host": "remove it: tierplane sets it",
    "port": "remove it: tierplane sets it",
    "api-key": "remove it: tierplane generates a secret for each engine process",
    "served-model-name": "use the tier's 'served_model_name'",
    "tensor-parallel-size": "use the tier's 'tensor_parallel_size'",
    "pipeline-parallel-size": "use the tier's 'pipeline_parallel_size'",
    "trust-remote-code": "use the tier's 'trust_remote_code'",
}


def with_dashes(value: dict[str, Any]) -> dict[str, Any]:
    """``engine_args`` with ``-`` for ``_`` in the names. Raises FindingsError for names that are no flags,
    that are given twice, or that only tierplane sets."""
    found = []
    first: dict[str, str] = {}
    for flag in value:
        normal = flag.replace("_", "-")
        if first.setdefault(normal, flag) != flag:
            message = f"'{first[normal]}' is the same flag"
            found.append(ConfigFinding((flag,), message, "remove one of the two"))
        elif normal in _SET_BY_TIERPLANE:
            remedy = _SET_BY_TIERPLANE[normal]
            found.append(ConfigFinding((flag,), "this flag can't be set here", remedy))
        elif not _FLAG.match(normal):
            message = f"'{flag}' is not the name of a flag"
            found.append(ConfigFinding((flag,), message, "write it without leading dashes"))
    if found:
        raise FindingsError(found)
    return {flag.replace("_", "-"): item for flag, item in value.items()}
