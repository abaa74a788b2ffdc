from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controlplane.cli.operating.explain import command
from controlplane.core.domain.endpoint import EndpointState
from tests.support.gateway import Rig, plane, running

THREE = ({"name": "lightweight"}, {"name": "balanced"}, {"name": "capable"})


async def ask(rig: Rig, *arguments: str, text: str | None = None) -> Result:
    """The command needs a thread of its own: the gateway answers in this loop."""
    options = ["--url", rig.base, *arguments]
    return await asyncio.to_thread(CliRunner().invoke, command, options, text)


async def test_the_choice_and_the_excluded_endpoints_are_shown() -> None:
    async with running(plane(*THREE)) as rig:
        await rig.engine("light-1", "lightweight")
        await rig.engine("light-2", "lightweight")
        await rig.engine("mid-1", "balanced")
        rig.change("light-1", state=EndpointState.RESTARTING)
        result = await ask(rig, "--complexity", "simple")
        assert result.exit_code == 0
        first, *rest = result.output.splitlines()
        assert first.startswith("lightweight → light-2: ")
        assert any("requested" in line and "lightweight" in line for line in rest)
        lines = {line.split()[0]: line for line in rest if "light-1" in line or "mid-1" in line}
        assert "left out: " in lines["light-1"]
        assert any(line.startswith("→") and "light-2" in line for line in rest)


async def test_options_override_the_body(tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_text(json.dumps({"model": "lightweight", "messages": [], "metadata": {"priority": "low"}}))
    async with running(plane(*THREE)) as rig:
        await rig.engine("light", "lightweight")
        await rig.engine("big", "capable")
        by_body = json.loads((await ask(rig, "--json", "--body", str(path))).output)
        by_option = json.loads((await ask(rig, "--json", "--body", str(path), "--model", "capable")).output)
        by_stdin = json.loads((await ask(rig, "--json", "--body", "-", text='{"model": "capable"}')).output)
    assert by_body["endpoint"] == "light"
    assert by_option["endpoint"] == by_stdin["endpoint"] == "big"


async def test_every_hint_reaches_the_gateway() -> None:
    async with running(plane({"name": "lightweight", "agent_types": ["chatty"]}, *THREE[1:])) as rig:
        for tier in ("lightweight", "balanced", "capable"):
            await rig.engine(f"{tier}-1", tier)
        agent = json.loads((await ask(rig, "--json", "--agent-type", "chatty")).output)
        assert agent["tier"] == "lightweight"
        floor = json.loads(
            (await ask(rig, "--json", "--complexity", "simple", "--min-tier", "capable")).output
        )
        assert floor["tier"] == "capable"
        assert floor["tiers"]["floor"] == "capable"
        wrong = await ask(rig, "--priority", "urgent")
        assert "x-priority must be one of" in str(wrong.exception)


async def test_a_refusal_is_shown_and_exits_with_1() -> None:
    async with running(plane(*THREE)) as rig:
        await rig.engine("light", "lightweight")
        result = await ask(rig, "--model", "nothing-like-it")
    assert result.exit_code == 1
    assert result.output.startswith("refused: ")
    assert "nothing-like-it" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "no gateway answers at http://127.0.0.1:9"),
        (["--url", "127.0.0.1:9"], "is not an address"),
        (["--url", "http://127.0.0.1:9", "--body", "-"], "--body is not JSON"),
    ],
)
def test_wrong_options_are_explained(options: list[str], message: str) -> None:
    result = CliRunner().invoke(command, options, input="{")
    assert result.exit_code != 0
    assert message in str(result.exception)
