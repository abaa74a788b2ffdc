"""Rows of a file of recorded arrivals, one per request: which column is what, and in which unit.

A CSV or JSON lines file is recognised by the names of its fields, whatever their order, case and quotes. What
a number in the time field means follows from the field's unit (``_ms``), from its size (Unix time), or from
the fields of a known trace. If none of these decides, the caller has to: a guess would replay a trace a
thousand times too fast.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TextIO

from controlplane.core.domain.request import Complexity, Priority
from controlplane.errors import SetupError

TimeUnit = Literal["s", "ms", "us", "ns"]
Cells = Sequence[Any]

BLOCK_TOKENS: Final = 512
"""Prompt tokens in one block of :attr:`Arrival.blocks`."""

_TIME: Final = frozenset(
    (
        "at", "timestamp", "time", "ts", "arrival", "arrivaltime", "arrivaltimestamp", "arrivedat",
        "created", "createdat", "starttime", "requesttime", "requesttimestamp", "datetime", "date",
        "sentat"
    )
)  # fmt: skip
_INPUT: Final = frozenset(
    (
        "inputtokens", "inputlength", "inputlen", "numinputtokens", "contexttokens", "prompttokens",
        "promptlength", "promptlen", "requesttokens", "prefilltokens", "numprefilltokens"
    )
)  # fmt: skip
_OUTPUT: Final = frozenset(
    (
        "outputtokens", "outputlength", "outputlen", "numoutputtokens", "generatedtokens",
        "completiontokens", "responsetokens", "responselength", "responselen", "decodetokens",
        "numdecodetokens"
    )
)  # fmt: skip
_UNITS: Final[dict[str, TimeUnit]] = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "millis", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "micros", "microseconds"), "us"),
    **dict.fromkeys(("ns", "nanos", "nanoseconds"), "ns"),
}
_PER_S: Final[dict[TimeUnit, float]] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_UNIT_WORDS: Final[dict[TimeUnit, str]] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_FIRST_UNIX_S: Final = 1e8
"""1973-03-03: no trace lasts three years, so a first time beyond this is Unix time."""
_LAST_UNIX_S: Final = 1e11
"""The year 5138: a first time beyond this many seconds is Unix time in a finer unit."""
_EXAMINED: Final = 1000
"""Rows from which the unit of the times is recognised."""
_SKIPPED_RATIO: Final = 0.05
"""With more unreadable rows than this, the file is refused."""
_DISORDER_S: Final = 60.0
"""A row whose time is before that of the previous row, by up to this much, gets the previous row's time."""
_DATE: Final = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d(?::\d\d)?)(\.\d+)?\s*(Z|[+-]\d\d(?::?\d\d)?)?")
_MOST_REASONS: Final = 20
_MOST_TOKENS: Final = 100_000_000
_SMALL_BLOCK_TOKENS: Final = 16
_MOST_JSON_BYTES: Final = 256 * 2**20
"""Size of a JSON array, which is read whole; JSON lines and CSV have no limit."""


class Arrival(NamedTuple):
    """One request of a trace."""

    at_s: float
    """Seconds since the beginning of the trace."""
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None
    """Hashes of the prompt's blocks of ``BLOCK_TOKENS`` tokens, from the first one."""
    tier: str = ""
    complexity: Complexity | None = None
    priority: Priority = Priority.NORMAL
    session: int | None = None


@dataclass(slots=True)
class TraceReport:
    """How a trace was read, and what was left out of it. Filled while the rows are read."""

    read_as: str = ""
    """The format and the meaning of its times."""
    rows: int = 0
    """Rows with a request, before any thinning."""
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """For each reason the number of rows that were left out, and the line of the first one."""
    moved: int = 0
    """Rows out of order that were moved to the time of the row before."""

    def skip(self, line: int, reason: str) -> None:
        """Count a row that was left out."""
        if len(self.skipped) >= _MOST_REASONS and reason not in self.skipped:
            reason = "other reasons"
        found = self.skipped.setdefault(reason, [0, line])
        found[0] += 1

    def lines(self) -> list[str]:
        """Sentences for the user: how the trace was read, then what was left out."""
        found = [f"the trace was read as {self.read_as}"]
        found += [
            (
                f"1 row was skipped, line {line}: "
                if count == 1
                else f"{count} rows were skipped, the first in line {line}: "
            )
            + reason
            for reason, (count, line) in self.skipped.items()
        ]
        if self.moved:
            found.append(f"out of order, and moved to the time of the row before: {self.moved}")
        return found


def is_request_table(columns: Iterable[str]) -> bool:
    """Whether these are the fields of a file with one request per row."""
    return all(any(_base(name) in names for name in columns) for names in (_TIME, _INPUT, _OUTPUT))


def _base(name: str) -> str:
    return _split_unit(name)[0]


def _split_unit(name: str) -> tuple[str, TimeUnit | None]:
    """``Arrival time (ms)`` as ``("arrivaltime", "ms")``."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    if len(words) > 1 and words[-1] in _UNITS:
        return "".join(words[:-1]), _UNITS[words[-1]]
    return "".join(words), None


def cells(text: str) -> list[str]:
    """A line of a CSV with commas, semicolons or tabs as its cells."""
    return [cell.strip() for cell in next(csv.reader([text], delimiter=_delimiter(text)), [])]


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def first_line(path: Path) -> str:
    """The first line that is not blank, without a byte order mark. Raises SetupError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return next((line.strip() for line in file if line.strip()), "")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"the trace {path} can't be read: {error}") from error


def json_columns(path: Path, first: str) -> list[str]:
    """The fields of the first object of JSON lines or of a JSON array. Raises SetupError."""
    try:
        if first.startswith("["):
            rows = _json_array(path)
            found = rows[0] if rows else {}
        else:
            found = json.loads(first)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path}, line 1 is no JSON object: {error}") from error
    return list(found) if isinstance(found, dict) else []


def _json_array(path: Path) -> list[Any]:
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise SetupError(
            f"{path} is a JSON array of more than {_MOST_JSON_BYTES // 2**20} MiB: write one object per line"
        )
    found = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(found, list):
        raise SetupError(f"{path} is no list of objects")
    return found


class _Columns(NamedTuple):
    """The fields that are used, by their names in the file."""

    time: str
    unit: TimeUnit | None
    """From the name of the field."""
    input: str
    output: str
    names: frozenset[str]

    @staticmethod
    def of(names: Sequence[str]) -> _Columns:
        time, unit = next((name, _split_unit(name)[1]) for name in names if _base(name) in _TIME)
        prompt = next(name for name in names if _base(name) in _INPUT)
        output = next(name for name in names if _base(name) in _OUTPUT)
        return _Columns(time, unit, prompt, output, frozenset(names))


def read_requests(
    path: Path, columns: Sequence[str], *, time_unit: TimeUnit | None, report: TraceReport
) -> Iterator[Arrival]:
    """The requests of a file whose fields are ``columns``, in the order of their times.

    ``time_unit`` is what a number in the time field counts; None means that it is recognised. SetupError
    names the file, the line and the remedy.
    """
    used = _Columns.of(columns)
    times = _Times(path, used, time_unit, list(islice(_rows(path, columns), _EXAMINED)))
    report.read_as = times.words
    to_arrival = _converter(used)
    before_s = -math.inf
    for line, row in _rows(path, columns):
        try:
            at_s = times.seconds(row[used.time])
            arrival = to_arrival(row, at_s)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            report.skip(line, _reason(error))
            _refuse_if_mostly_unreadable(path, report, at_end=False)
            continue
        if at_s < before_s:
            if before_s - at_s > _DISORDER_S:
                report.skip(line, f"more than {_DISORDER_S:g} s out of order: sort the file by time")
                _refuse_if_mostly_unreadable(path, report, at_end=False)
                continue
            report.moved += 1
            arrival = arrival._replace(at_s=before_s)
        before_s = arrival.at_s
        report.rows += 1
        yield arrival
    _refuse_if_mostly_unreadable(path, report, at_end=True)


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _refuse_if_mostly_unreadable(path: Path, report: TraceReport, *, at_end: bool) -> None:
    skipped = sum(count for count, _ in report.skipped.values())
    total = report.rows + skipped
    if skipped > _SKIPPED_RATIO * total and (at_end or total > _EXAMINED):
        reason, (_, line) = next(iter(report.skipped.items()))
        raise SetupError(f"{path}, line {line}: {reason} ({skipped} of {total} rows can't be used)")


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its line; a row that is no object or has another number of cells comes as ``{}``."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "").strip()
        if first.startswith("["):
            yield from enumerate((row if isinstance(row, dict) else {} for row in _json_array(path)), 1)
            return
        file.seek(0)
        yield from _json_lines(file) if first.startswith("{") else _csv_rows(file, columns, _delimiter(first))


def _json_lines(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = {}
            yield number, row if isinstance(row, dict) else {}


def _csv_rows(file: TextIO, columns: Sequence[str], delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, delimiter=delimiter)
    header = False
    for row in reader:
        if not any(row):
            continue
        if header:
            yield reader.line_num, dict(zip(columns, row, strict=False))
        header = True


class _Times:
    """From the cells of the time field to seconds."""

    def __init__(
        self, path: Path, used: _Columns, time_unit: TimeUnit | None, rows: list[tuple[int, dict[str, Any]]]
    ) -> None:
        found = [number for _, row in rows if (number := _number(row.get(used.time))) is not None]
        self.words = "dates, counted from the first row"
        self._per_s = 1.0
        self._start_s: float | None = None
        if not found:
            return
        unit = time_unit or used.unit or _known_unit(used, found)
        first = found[0]
        if (
            time_unit is None
            and first >= (_FIRST_UNIX_S if unit is None else _LAST_UNIX_S)
            and unit in (None, "s")
        ):
            unit = "s" if first < _LAST_UNIX_S else "ms" if first < 1e14 else "us" if first < 1e17 else "ns"
        if unit is None:
            raise SetupError(
                f"{path}: nothing says in which unit {used.time} counts (the first values are "
                f"{', '.join(f'{each:g}' for each in found[:3])}): give --time-unit s or --time-unit ms"
            )
        self._per_s = _PER_S[unit]
        unix = first / self._per_s >= _FIRST_UNIX_S
        self.words = f"{'Unix time in ' if unix else ''}{_UNIT_WORDS[unit]}"
        if _base(used.time) == "at" and not unix:
            self._start_s = 0.0
        else:
            self.words += ", counted from the first row"

    def seconds(self, cell: Any) -> float:
        """Seconds since the beginning. Raises ValueError or TypeError."""
        number = _number(cell)
        at_s = _date(cell) if number is None else number / self._per_s
        if not math.isfinite(at_s):
            raise ValueError("the time is not finite")
        if self._start_s is None:
            self._start_s = at_s
        at_s -= self._start_s
        if at_s < 0:
            raise ValueError("the time lies before the beginning of the trace")
        return at_s


def _known_unit(used: _Columns, first: Sequence[float]) -> TimeUnit | None:
    """The unit of a published trace, by its fields; None if they don't decide."""
    names = {_base(name) for name in used.names}
    if {"chatid", "parentchatid"} <= names:  # Alibaba's Bailian traces
        return "s"
    if _base(used.time) in ("at", "arrivedat"):  # our own files; Vidur
        return "s"
    if {"timestamp", "requesttokens", "responsetokens"} <= names:  # BurstGPT
        return "s"
    mooncake = {"timestamp", "inputlength", "outputlength", "hashids"} <= names
    if mooncake and all(number.is_integer() for number in first):
        return "ms"
    return None


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, int | float):
        return float(cell)
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _date(cell: Any) -> float:
    """A date and time in ISO 8601, with any number of decimals; UTC where it names no zone."""
    text = str(cell).strip()
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d(?::\d\d)?)(\.\d+)?\s*(Z|[+-]\d\d(?::?\d\d)?)?", text
    )
    if match is None:
        raise ValueError("the time is neither a number nor a date")
    day, clock, decimals, zone = match.groups()
    moment = datetime.fromisoformat(f"{day}T{clock}{'' if zone in (None, 'Z') else zone}")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + float(decimals or 0.0)


def _tokens(cell: Any, what: str) -> int:
    number = _number(cell)
    if number is None or not number.is_integer():
        raise ValueError(f"the number of {what} tokens is not a whole number")
    if not 1 <= number <= _MOST_TOKENS:
        raise ValueError(f"the number of {what} tokens is not between 1 and {_MOST_TOKENS}")
    return int(number)


def _converter(used: _Columns) -> Callable[[dict[str, Any], float], Arrival]:
    by_base = {_base(name): name for name in used.names}
    blocks = by_base.get("hashids")
    small = {"chatid", "parentchatid"} <= set(by_base)
    tier, complexity, priority, session = (
        by_base.get(name, "") for name in ("tier", "complexity", "priority", "session")
    )

    def to_arrival(row: dict[str, Any], at_s: float) -> Arrival:
        hashes = row.get(blocks) if blocks else None
        return Arrival(
            at_s,
            _tokens(row[used.input], "prompt"),
            _tokens(row[used.output], "response"),
            _blocks(hashes, small) if isinstance(hashes, list) else None,
            str(row.get(tier) or ""),
            Complexity(row[complexity]) if row.get(complexity) else None,
            Priority(row[priority]) if row.get(priority) else Priority.NORMAL,
            int(row[session]) if row.get(session) not in (None, "") else None,
        )

    return to_arrival


def _blocks(hashes: list[Any], small: bool) -> tuple[int, ...] | None:
    """Hashes of blocks of ``BLOCK_TOKENS`` tokens; smaller ones are joined, an incomplete one is left out."""
    if not small:
        return tuple(int(each) for each in hashes) or None
    each = BLOCK_TOKENS // _SMALL_BLOCK_TOKENS
    whole = range(0, len(hashes) - each + 1, each)
    return tuple(hash(tuple(hashes[i : i + each])) for i in whole) or None
