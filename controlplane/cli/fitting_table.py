"""Tables that fit the terminal without truncating anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, TypeAlias

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Cell: TypeAlias = str | Text

_GAP: Final = 2


class FittingTable:
    """Rows in columns that are as wide as their contents.

    If they don't fit, columns are removed from the table: those in ``leave`` first, in this order, then the
    others from right to left; the first column stays. Each row is then followed by the values of the removed
    columns, on indented lines with the columns' names.
    """

    def __init__(
        self,
        *heads: str,
        right: Collection[str] = (),
        leave: Sequence[str] = (),
        without_empty: Collection[str] = (),
    ) -> None:
        """``right``: columns that are aligned at the right; ``without_empty``: columns that are only there
        if a row has something in them."""
        self.heads = heads
        self.rows: list[tuple[Text, ...]] = []
        self._right = right
        self._leave = leave
        self._without_empty = without_empty

    def add_row(self, *cells: Cell) -> None:
        """Add a row with one cell for each column."""
        if len(cells) != len(self.heads):
            raise ValueError(f"{len(cells)} cells for {len(self.heads)} columns")
        self.rows.append(tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        there = [
            number
            for number, head in enumerate(self.heads)
            if head not in self._without_empty or any(row[number].plain for row in self.rows)
        ]
        width = {
            number: max(len(self.heads[number]), *(row[number].cell_len for row in self.rows), 0)
            for number in there
        }
        shown = list(there)
        for number in self._order(there):
            if sum(width[each] + _GAP for each in shown) - _GAP <= options.max_width:
                break
            shown.remove(number)
        details = [number for number in there if number not in shown]

        def line(cells: Sequence[Text], style: str = "") -> Table:
            table = Table(box=None, padding=(0, _GAP, 0, 0), show_header=False, pad_edge=False, style=style)
            for number in shown:
                right = self.heads[number] in self._right
                table.add_column(
                    justify="right" if right else "left",
                    width=min(width[number], options.max_width),
                    overflow="fold",
                )
            table.add_row(*(cells[number] for number in shown))
            return table

        yield line([Text(head) for head in self.heads], "bold")
        for row in self.rows:
            if any(row[number].plain for number in shown):
                yield line(row)
            parts = [self._detail(number, row[number]) for number in details if row[number].plain]
            for packed in _packed(parts, options.max_width - _GAP):
                yield Padding(packed, (0, 0, 0, _GAP))

    def _order(self, there: Sequence[int]) -> list[int]:
        """The columns in the order in which they leave."""
        first = [self.heads.index(head) for head in self._leave]
        order = [*first, *(number for number in reversed(there) if number not in first)]
        return [number for number in order if number in there and number != there[0]]

    def _detail(self, number: int, cell: Text) -> Text:
        head = self.heads[number]
        return Text.assemble((f"{head} ", "dim"), cell) if head else cell


def _packed(parts: Sequence[Text], width: int) -> list[Text]:
    """The parts on as few lines as possible; only a part that is wider than a line is broken."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + part.cell_len + 2 <= width:
            lines[-1] = Text(", ").join((lines[-1], part))
        else:
            lines.append(part)
    return lines
