from __future__ import annotations

import pytest
from rich.table import Table
from rich.text import Text

from controlplane.cli.console import say, stdout
from controlplane.cli.lifecycle.logs import readable
from controlplane.cli.operating.events import event_line
from controlplane.core.domain.event import Event
from controlplane.engines.supervision.process import EngineOutput
from controlplane.terminal import printable

HOSTILE = [
    "\x1b]52;c;cHduZWQ=\x07",  # the clipboard
    "\x1b]0;title\x1b\\",
    "\x1b]0;without an end",
    "\x9d0;title\x9c",
    "\x1bP+q544e\x1b\\",
    "\x1b[2J\x1b[1;1H",
    "\x9b31m",
    "\x1b[?1049h",
    "\x1bc",
    "\x1b(0",
    "\x1b",
    "\x07\x08\x0d\x7f\x85",
    "\u202e",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_control_sequences_are_removed(hostile: str) -> None:
    assert printable(f"a\tb {hostile}\nc") == "a\tb \nc"


def test_text_is_kept() -> None:
    text = "Grüße, 你好, \N{GRINNING FACE}\t[1;31m] 100 %\n"
    assert printable(text) == text
    assert printable("\ud800x") == "\N{REPLACEMENT CHARACTER}x"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_control_sequence_reaches_the_operator(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = EngineOutput("", None, lambda line: None)
    output.feed(f"x {hostile}\n".encode())
    shown = [*output.lines, event_line(Event(1, 0.0, "cordon", "s", hostile, "t", "ada"))]
    table = Table()
    table.add_column(hostile)
    table.add_row(Text(f"cell {hostile}"), hostile)
    stdout().print(table)
    stdout().print(f"line {hostile}", markup=False)
    say(f"{hostile} {readable(hostile)}")
    shown.append(capsys.readouterr().out)
    for text in shown:
        assert text.replace("\n", "").isprintable(), text
