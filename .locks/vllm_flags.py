"""Write the list of flags that tierplane checks a configuration against, from the installed vLLM.

``make vllm-flags``; see controlplane/config/flags.py.
"""

from __future__ import annotations

import json
from pathlib import Path

LIST = Path(__file__).parents[1] / "controlplane" / "config" / "vllm_flags.json"


def installed_flags() -> dict[str, object]:
    """vLLM's version (major.minor) and the flags of its API server, without ``no-`` forms."""
    import vllm
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    actions = make_arg_parser(FlexibleArgumentParser())._actions
    options = {option.removeprefix("--") for action in actions for option in action.option_strings}
    flags = sorted(o for o in options if not o.startswith(("-", "no-")) and o != "help")
    return {"vllm": ".".join(vllm.__version__.split(".")[:2]), "flags": flags}


if __name__ == "__main__":
    LIST.write_text(json.dumps(installed_flags(), indent=1) + "\n")
