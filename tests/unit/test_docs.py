"""The documentation: what it links to, names and shows exists, and generated pages are up to date."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from controlplane.cli import main
from controlplane.cli.reference import PAGE as COMMANDS_PAGE
from controlplane.cli.reference import commands_page
from controlplane.config import load_plane
from controlplane.config.reference import PAGE as SETTINGS_PAGE
from controlplane.config.reference import settings_page
from controlplane.core.alerts.rules import PREFIX, RULES
from controlplane.core.routing import retry
from controlplane.errors import RequestError
from controlplane.gateway.gateway import Gateway
from controlplane.monitoring.reference import PAGE as METRICS_PAGE
from controlplane.monitoring.reference import metrics_page
from tests.support.repository import CONFIGS, ROOT, relative, tracked

DOCS = tracked("*.md")
README_LINES = 200
FOLDERS = sorted({relative(path).split("/")[0] for path in tracked() if path.parent != ROOT})
FILE_NAMES = {path.name for path in tracked()}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
_PATH = re.compile(rf"(?<![\w./~-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*[\w*]")
_FILE = re.compile(r"^[\w./*-]+\.(?:py|md|svg|yaml|json|html|toml)$")
_SEPARATORS = {"|", "&&", ";", ">", "&", "||"}


class Shown(NamedTuple):
    """A command line in a page."""

    page: str
    line: str
    shell: bool
    """In a block that a reader is to run."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The code blocks of a page: language and content."""
    for found in _FENCE.finditer(text):
        yield found[1], found[2]
    for found in _INDENTED.finditer(_FENCE.sub("", text)):
        yield "indented", found[0]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return _INDENTED.sub("", _FENCE.sub("", text))


def shown(path: Path) -> Iterator[Shown]:
    """Every command line of ``tierplane`` and ``make`` in a page."""
    text = path.read_text("utf-8")
    for language, content in blocks(text):
        for raw in content.replace("\\\n", " ").splitlines():
            line = raw.strip()
            shell = language in {"bash", "indented"}
            if shell or line.startswith("$ "):
                yield Shown(relative(path), line.removeprefix("$ "), shell)
    for code in _INLINE.findall(prose(text)):
        yield Shown(relative(path), " ".join(code.split()), False)


COMMAND_LINES = [
    line for path in DOCS for line in shown(path) if line.line.startswith(("tierplane ", "make "))
]


def words(line: str) -> list[str]:
    """The arguments of a command line, without what follows it and without a comment."""
    found = shlex.split(line, comments=True)
    end = next((number for number, word in enumerate(found) if word in _SEPARATORS), len(found))
    return found[1:end]


def check_tierplane(arguments: list[str]) -> str:
    """What is wrong with the arguments of ``tierplane``; empty: nothing."""
    context = click.Context(main, info_name="tierplane")
    for word in arguments:
        command = context.command
        if word.startswith("-") and len(word) > 1:
            known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
            if word.partition("=")[0] not in known | {"-h", "--help"}:
                return f"{context.command_path} has no option {word}"
        elif isinstance(command, click.Group) and not word.isupper():
            below = command.get_command(context, word)
            if below is None:
                return f"{context.command_path} has no command {word}"
            context = click.Context(below, parent=context, info_name=word)
    return ""


def check_make(arguments: list[str]) -> str:
    """What is wrong with the arguments of ``make``; empty: nothing."""
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for word in arguments:
        variable, equals, _ = word.partition("=")
        if equals and f"$({variable})" not in MAKEFILE:
            return f"the Makefile has no variable {variable}"
        if not equals and word not in targets and not word.isupper():
            return f"the Makefile has no target {word}"
    return ""


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(_FENCE.sub("", path.read_text("utf-8"))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        times = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{times}" if times else name)
    return names


def test_there_is_something_to_check() -> None:
    pages = {relative(path) for path in DOCS}
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/scope.md"} <= pages
    assert len([page for page in pages if page.startswith("docs/")]) >= 14
    assert len(COMMAND_LINES) > 50


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    dead = []
    for pair in _LINK.findall(_INLINE.sub("", prose(path.read_text("utf-8")))):
        link = pair[0] or pair[1]
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("path", DOCS, ids=relative)
def test_paths_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    dead = [name for name in _PATH.findall(text) if not any(ROOT.glob(name))]
    for code in _INLINE.findall(prose(text)):
        name = code.strip()
        if not _FILE.match(name):
            continue
        if "/" not in name:
            known = "*" in name or not name.endswith((".py", ".md", ".svg")) or name in FILE_NAMES
        else:
            roots = (ROOT, path.parent, ROOT / "controlplane")
            known = any((root / name).exists() or any(root.glob(name.removeprefix("../"))) for root in roots)
        if not known:
            dead.append(name)
    assert dead == []


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: f"{line.page}: {line.line[:60]}")
def test_commands_and_options_exist(line: Shown) -> None:
    check = check_tierplane if line.line.startswith("tierplane ") else check_make
    assert check(words(line.line)) == ""


def test_what_a_wrong_command_is_called() -> None:
    assert check_tierplane(["plan", "x.yaml", "--cluster", "y"]) == ""
    assert check_tierplane(["plan", "--no-such"]) == "tierplane plan has no option --no-such"
    assert check_tierplane(["k8s", "renders"]) == "tierplane k8s has no command renders"
    assert check_tierplane(["COMMAND", "--help"]) == ""
    assert check_make(["up", "CONFIG=x"]) == ""
    assert check_make(["upp"]) == "the Makefile has no target upp"
    assert check_make(["up", "CONFIK=x"]) == "the Makefile has no variable CONFIK"


def test_the_readme_and_the_guide_show_how_to_begin() -> None:
    in_readme = [words(line.line) for line in COMMAND_LINES if line.page == "README.md" and line.shell]
    assert [found for found in in_readme if found in (["up"], ["test"])] == [["up"], ["test"]]
    guide = {words(line.line)[0] for line in COMMAND_LINES if line.page.startswith(("README", "docs/guide"))}
    assert {"up", "down", "validate", "doctor", "status", "drain", "alerts", "report", "simulate"} <= guide
    assert any("configs/cpu.yaml" in path.read_text("utf-8") for path in DOCS)


@pytest.mark.parametrize(
    ("page", "made"),
    [(SETTINGS_PAGE, settings_page), (COMMANDS_PAGE, commands_page), (METRICS_PAGE, metrics_page)],
    ids=["settings", "commands", "metrics"],
)
def test_generated_pages_are_up_to_date(page: Path, made: Callable[[], str]) -> None:
    assert (ROOT / page).read_text("utf-8") == made(), "run: make docs"


def test_every_setting_and_metric_is_described() -> None:
    for page in (settings_page(), metrics_page()):
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert len(rows) > 30
        assert [line for line in rows if line.endswith("|  |")] == []
    assert "`concurrency_limit`" in settings_page()
    assert "`tierplane_requests_total`" in metrics_page()


async def test_the_http_reference_has_every_route() -> None:
    text = (ROOT / "docs/reference/http.md").read_text("utf-8")
    gateway = Gateway(load_plane(CONFIGS / "simulated.yaml").plane, "g")
    there = {f"{route.method} {route.path}" for route in gateway.routes}
    assert set(re.findall(r"^\| `((?:GET|POST) /[^`]*)`", text, re.MULTILINE)) == there


def test_the_http_reference_has_every_error() -> None:
    text = (ROOT / "docs/reference/http.md").read_text("utf-8")
    rows = set(re.findall(r"^\| (\d+)(?:, \d+)* \| `(\w+)` \|", text, re.MULTILINE))
    kinds: list[type[RequestError]] = [RequestError, *RequestError.__subclasses__()]
    raised = {(str(kind.status), kind.code) for kind in kinds}
    raised |= {(str(rule.status), rule.code) for rule in retry.RULES.values()}
    assert raised <= rows
    assert {code for _, code in rows} == {code for _, code in raised}


def test_the_guide_has_every_alert_as_the_command_lists_it() -> None:
    text = (ROOT / "docs/guide/alerts.md").read_text("utf-8")
    result = CliRunner().invoke(main, ["alerts", "rules"])
    listed = [line.rstrip() for line in result.output.splitlines()]
    assert "\n".join(listed) in text
    names = {rule.name for rule in RULES}
    for path in DOCS:
        assert set(re.findall(rf"\b{PREFIX}[A-Z]\w+", path.read_text("utf-8"))) <= names, relative(path)


def test_the_architecture_has_every_package_and_layer() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    packages = {relative(path.parent) for path in tracked("controlplane/**/__init__.py", "deployments/*.py")}
    rows = set(re.findall(r"^\| `((?:controlplane|deployments)[\w/]*)` \|", text, re.MULTILINE))
    assert rows == packages - {"controlplane"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layered = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert len(layered) == 2
    for layers in layered:
        assert "\n".join(["```", *layers, "```"]) in text
