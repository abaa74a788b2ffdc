"""The clients of the table that the test environment has, against a gateway with the simulated engine, once
with all interfaces and once with chat completions and messages only."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from controlplane.core.domain.endpoint import Capabilities
from tests.support.gateway import CAPABILITIES, running
from tests.support.repository import ROOT

CLIENTS = ("openai-python", "anthropic", "LangChain", "Agent Framework")


@pytest.mark.parametrize("capabilities", [CAPABILITIES, Capabilities(messages=True)], ids=["all", "chat"])
async def test_every_client_works_with_streams_tools_structured_output_and_errors(
    capabilities: Capabilities,
) -> None:
    async with running() as rig:
        await rig.engine("only", limit=64, ttft_ms=300)
        rig.change("only", capabilities=capabilities)
        program = str(ROOT / "tests" / "clients" / "python_clients.py")
        child = await asyncio.create_subprocess_exec(
            sys.executable, program, rig.base, "balanced", *CLIENTS, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(child.communicate(), 200)
    table = json.loads(output.splitlines()[-1])
    assert len(table) == len(CLIENTS) + 1
    wrong = {
        f"{client}, {feature}": found
        for client, features in table.items()
        for feature, found in features.items()
        if found != "ok"
    }
    assert not wrong
