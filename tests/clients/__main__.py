"""The client table: ``python -m tests.clients http://127.0.0.1:8080``.

Runs the clients that people use (in Python and, if Node is installed, in JavaScript) against a running
gateway, each with a stream, a loop with a tool, structured output and errors, and prints what works. The
clients are installed once, in exact versions, into ``.venv/clients``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
FEATURES = ("stream", "tools", "structured", "errors")
LIMIT_S = 1800.0
ENVIRONMENTS = {
    "requirements": (
        "openai-python",
        "anthropic",
        "LangChain",
        "Agent Framework",
        "pydantic-ai",
        "instructor",
        "litellm",
    ),
    "requirements-llamaindex": ("LlamaIndex",),
}
"""Lists of packages → the clients in them; LlamaIndex needs an older openai."""


def python_clients(folder: Path, name: str) -> list[str]:
    """The command that runs Python clients of one environment; they are installed if need be."""
    requirements = HERE / f"{name}.txt"
    installed = folder / f"{name}.txt"
    python = folder / name / "bin" / "python"
    if not installed.is_file() or installed.read_bytes() != requirements.read_bytes():
        print(f"installing the Python clients of {requirements.name}", file=sys.stderr)
        venv.create(folder / name, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)
        shutil.copy(requirements, installed)
    return [str(python), str(HERE / "python_clients.py")]


def node_clients(folder: Path) -> list[str] | None:
    """The command that runs the JavaScript clients; None without Node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        print("without Node and npm, the JavaScript clients are left out", file=sys.stderr)
        return None
    lock = (HERE / "node" / "package-lock.json").read_text("utf-8")
    place = folder / "node"
    place.mkdir(parents=True, exist_ok=True)
    installed = place / "installed"
    if not installed.is_file() or installed.read_text("utf-8") != lock:
        print("installing the JavaScript clients", file=sys.stderr)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "node" / name, place)
        subprocess.run([npm, "ci", "--no-audit", "--no-fund", "--silent"], cwd=place, check=True)
        installed.write_text(lock, "utf-8")
    shutil.copy(HERE / "node" / "clients.mjs", place)
    return [node, str(place / "clients.mjs")]


def results(command: list[str], arguments: list[str]) -> dict[str, dict[str, str]]:
    """Run one set of clients: client → feature → ``ok`` or what went wrong."""
    quiet = {"AGENT_FRAMEWORK_USER_AGENT_DISABLED": "true", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        timeout=LIMIT_S,
        check=True,
        env={**os.environ, **quiet},
    )
    table: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return table


def main() -> int:
    """The command line; the exit status is 1 if anything does not work."""
    parser = argparse.ArgumentParser(description="Which clients work with a running gateway")
    parser.add_argument("base", help="the gateway's address, such as http://127.0.0.1:8080")
    parser.add_argument("--model", default="balanced", help="the tier or model that they ask for")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / ".venv" / "clients")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = [options.base.rstrip("/"), options.model]
    table: dict[str, dict[str, str]] = {}
    for name, clients in ENVIRONMENTS.items():
        table |= results(python_clients(options.folder, name), [*arguments, *clients])
    node = node_clients(options.folder)
    if node is not None:
        table |= results(node, arguments)
    if options.json:
        print(json.dumps(table, indent=2))
    else:
        print("| client | " + " | ".join(FEATURES) + " |\n|---|" + "---|" * len(FEATURES))
        for client, found in table.items():
            print(f"| {client} | " + " | ".join(found.get(feature, "–") for feature in FEATURES) + " |")
    return 0 if all(value == "ok" for found in table.values() for value in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
