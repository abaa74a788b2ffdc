"""Write the list of flags that tierplane checks a configuration against, from the installed vLLM.

``make vllm-flags``; see controlplane/config/vllm_flags.py. Says what is different from the list before.
"""

from __future__ import annotations

import json
from pathlib import Path

from controlplane.config.vllm_flags import drift
from controlplane.engines.vllm_parser import check_command_lines

LIST = Path(__file__).parents[1] / "controlplane" / "config" / "vllm_flags.json"

if __name__ == "__main__":
    installed = check_command_lines([])
    print(drift(installed.version, installed.flags))
    LIST.write_text(json.dumps({"vllm": installed.version, "flags": installed.flags}, indent=1) + "\n")
