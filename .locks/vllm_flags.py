"""Writes vLLM's flags and what they take, which configurations are checked with, from the installed vLLM.

Run with ``make vllm-flags``; prints the differences from the previous list. See
controlplane/config/vllm_flags.py.
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
    lines = ",\n".join(
        f"  {json.dumps(flag)}: {json.dumps(installed.values[flag])}" for flag in installed.flags
    )
    LIST.write_text(f'{{\n "vllm": {json.dumps(installed.version)},\n "flags": {{\n{lines}\n }}\n}}\n')
