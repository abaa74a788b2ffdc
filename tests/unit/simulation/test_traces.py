from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from controlplane.core.domain.request import Complexity, Priority
from controlplane.errors import SetupError
from controlplane.simulation.trace_rows import TraceReport
from controlplane.simulation.traces import SAMPLE_TRACE, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 19:15:51.2224670,879,55
"""
PLAIN = """at_s,input_tokens,output_tokens,tier,complexity,priority,session
0.5,10,5,capable,,high,
1.5,20,6,,simple,,77
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text, "utf-8")
    return path


def windows(rate: float, cv: float, count: int = 3) -> str:
    rows = [f"{600 * i},{rate},{cv},400,50" for i in range(count)]
    return "\n".join(["window_start_s,rate_rps,interarrival_cv,input_tokens_mean,output_tokens_mean", *rows])


def test_azure(tmp_path: Path) -> None:
    arrivals = list(read_trace(written(tmp_path, AZURE)))
    assert [(a.input_tokens, a.output_tokens) for a in arrivals] == [(374, 44), (396, 109), (879, 55)]
    assert arrivals[0].at_s == 0.0
    assert arrivals[1].at_s == pytest.approx(4.314579, abs=1e-4)
    assert len(list(read_trace(tmp_path / "trace", hours=0.5))) == 2


def test_mooncake(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]},
        {"timestamp": 3500, "input_length": 9, "output_length": 3, "hash_ids": []},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    first, second = read_trace(written(tmp_path, text))
    assert first.blocks == (0, 1, 2)
    assert (second.at_s, second.blocks) == (3.0, None)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        pytest.param(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
            "2024-05-10 00:00:37+00:00,76,15\n",
            [0.0, 36.99007],
            id="a date on a whole second",
        ),
        pytest.param(
            '\ufeff"Timestamp";"Request tokens";"Response tokens"\n"5";"472";"18"\n45;1087;230\n',
            [0.0, 40.0],
            id="BurstGPT, seconds, with a byte order mark, quotes and semicolons",
        ),
        pytest.param(
            "".join(
                f'{{"chat_id": {i}, "parent_chat_id": -1, "timestamp": {at}, "input_length": 100, '
                f'"output_length": 10, "type": "text", "turn": 1, "hash_ids": [{i}]}}\n'
                for i, at in enumerate((0.0, 900.25, 1800.5))
            ),
            [0.0, 900.25, 1800.5],
            id="Bailian, seconds in Mooncake's fields",
        ),
        pytest.param(
            "at_s,input_tokens,output_tokens\n1718000000,100,10\n1718000003,100,10\n",
            [0.0, 3.0],
            id="Unix time in seconds",
        ),
        pytest.param(
            "output_tokens,arrival_time_ms,input_tokens\n1,1718000000000,2\n3,1718000001500,4\n",
            [0.0, 1.5],
            id="Unix time in milliseconds, columns in another order",
        ),
        pytest.param(
            '[{"created": 1718000000, "prompt_tokens": 5, "completion_tokens": 6},'
            ' {"created": 1718000002, "prompt_tokens": 5, "completion_tokens": 6}]',
            [0.0, 2.0],
            id="a JSON array",
        ),
        pytest.param(
            '{"at_s": 0.5, "input_tokens": 5, "output_tokens": 6}\n'
            '{"at_s": 1.25, "input_tokens": 5, "output_tokens": 6}\n',
            [0.5, 1.25],
            id="our own fields as JSON lines",
        ),
        pytest.param(
            "time (ms)\tinput_len\toutput_len\n100\t5\t6\n350\t5\t6\n",
            [0.0, 0.25],
            id="tabs, unit in the name",
        ),
        pytest.param(
            "at_s,input_tokens,output_tokens\n2,5,6\n1.5,5,6\n3,5,6\n",
            [2.0, 2.0, 3.0],
            id="a little out of order",
        ),
    ],
)
def test_a_trace_is_read_by_its_fields(tmp_path: Path, text: str, times: list[float]) -> None:
    assert [a.at_s for a in read_trace(written(tmp_path, text))] == pytest.approx(times, abs=1e-4)


def test_the_unit_of_a_time_can_be_given(tmp_path: Path) -> None:
    path = written(tmp_path, "timestamp,prompt_tokens,completion_tokens\n1000,2,3\n4000,5,6\n")
    assert [a.at_s for a in read_trace(path, time_unit="ms")] == [0.0, 3.0]
    assert [a.at_s for a in read_trace(path, time_unit="s")] == [0.0, 3000.0]


def test_skipped_rows_are_counted_with_their_reason(tmp_path: Path) -> None:
    rows = [f"{i},10,5" for i in range(100)]
    rows[40], rows[60], rows[61] = "40,10,0", "x,10,5", "61,1"
    report = TraceReport()
    path = written(tmp_path, "\n\nat_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n\n")
    assert len(list(read_trace(path, report=report))) == 97
    assert report.rows == 97
    assert report.lines() == [
        "the trace was read as seconds",
        "1 row was skipped, line 44: the number of response tokens is not between 1 and 100000000",
        "1 row was skipped, line 64: the time is neither a number nor a date",
        "1 row was skipped, line 65: no field 'output_tokens'",
    ]


def test_small_blocks_are_joined_to_those_of_the_simulated_cache(tmp_path: Path) -> None:
    def row(chat: int, hashes: list[int]) -> str:
        return json.dumps(
            {
                "chat_id": chat,
                "parent_chat_id": -1,
                "timestamp": chat,
                "input_length": 16 * len(hashes),
                "output_length": 1,
                "hash_ids": hashes,
            }
        )

    path = written(tmp_path, row(0, list(range(70))) + "\n" + row(1, [*range(32), *range(100, 140)]))
    first, second = (arrival.blocks or () for arrival in read_trace(path))
    assert (len(first), len(second)) == (2, 2)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_the_sample_trace_is_read_whole() -> None:
    report = TraceReport()
    arrivals = list(read_trace(SAMPLE_TRACE, report=report))
    assert len(arrivals) == report.rows == 447
    assert report.lines() == ["the trace was read as seconds"]
    assert {a.complexity for a in arrivals} == set(Complexity)


def test_plain(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, PLAIN))
    assert (first.tier, first.priority, first.session) == ("capable", Priority.HIGH, None)
    assert (second.complexity, second.priority, second.session) == (Complexity.SIMPLE, Priority.NORMAL, 77)


def test_servegen_windows_have_their_rate_and_lengths(tmp_path: Path) -> None:
    arrivals = list(read_trace(written(tmp_path, windows(20.0, 1.5, 10)), seed=3))
    assert len(arrivals) / 6000 == pytest.approx(20.0, rel=0.05)
    assert statistics.median(a.input_tokens for a in arrivals) == pytest.approx(400, rel=0.05)
    assert statistics.median(a.output_tokens for a in arrivals) == pytest.approx(50, rel=0.1)
    assert all(a.at_s < b.at_s or a.at_s == b.at_s for a, b in pairwise(arrivals))


def test_thinned_windows_are_less_bursty(tmp_path: Path) -> None:
    path = written(tmp_path, windows(100.0, 4.0, 2))

    def variation(keep: float) -> float:
        times = [a.at_s for a in read_trace(path, keep_ratio=keep)]
        gaps = [b - a for a, b in pairwise(times)]
        return statistics.pstdev(gaps) / statistics.mean(gaps)

    assert variation(1.0) == pytest.approx(4.0, rel=0.15)
    assert variation(0.05) == pytest.approx(math.sqrt(1 + 0.05 * 15), rel=0.15)


def test_the_seed_determines_the_arrivals(tmp_path: Path) -> None:
    path = written(tmp_path, windows(5.0, 2.0))
    assert list(read_trace(path, seed=1)) == list(read_trace(path, seed=1))
    assert list(read_trace(path, seed=1)) != list(read_trace(path, seed=2))


def test_a_part_of_a_trace_begins_at_zero(tmp_path: Path) -> None:
    path = written(tmp_path, windows(5.0, 1.0, 6))
    part = list(read_trace(path, skip_hours=0.5, hours=0.25))
    assert 0.0 <= part[0].at_s < 5.0
    assert 890 < part[-1].at_s < 900


def test_thinning_uses_a_share_of_the_requests(tmp_path: Path) -> None:
    rows = "\n".join(f"{i},10,5" for i in range(4000))
    path = written(tmp_path, "at_s,input_tokens,output_tokens\n" + rows)
    assert 800 < len(list(read_trace(path, keep_ratio=0.25))) < 1200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,c\n1,2,3\n", "not a known trace"),
        ("", "not a known trace"),
        ("at_s,input_tokens,output_tokens\n1,2,x\n", "line 2"),
        ('{"timestamp": 0}\n', "not a known trace"),
        ('{"at_s": 0, "input_tokens": 1, "output_tokens": 1}\nnonsense\n', "line 2"),
        ("at_s,input_tokens,output_tokens\n1,2,3\n2,-4,3\n", "between 1 and"),
        ("at_s,input_tokens,output_tokens\n1,2,3\nnan,4,3\n", "not finite"),
        ("at_s,input_tokens,output_tokens\n9000,2,3\n1,4,3\n", "sort the file"),
        ("[1, 2]", "not a known trace"),
        ("timestamp,prompt_tokens,completion_tokens\n1,2,3\n4,5,6\n", "--time-unit"),
        ('{"timestamp": 0.5, "input_length": 1, "output_length": 1, "hash_ids": []}\n', "--time-unit"),
        ("at_s,input_tokens,output_tokens,priority\n1,2,3,urgent\n", "urgent"),
    ],
)
def test_an_invalid_trace_is_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        list(read_trace(written(tmp_path, text)))


OWN = """start_s,seconds,tier,requests,input_tokens,output_tokens
0,10,small,40,70.5,11
0,10,large,5,900,
10,10,small,0,,
10,10,large,7,,30
600,60,small,90,20,1
"""


def test_own_windows_have_the_counted_requests_and_tokens(tmp_path: Path) -> None:
    arrivals = list(read_trace(written(tmp_path, OWN)))
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    found: dict[tuple[str, float], list[tuple[int, int]]] = {}
    for a in arrivals:
        start_s = 0.0 if a.at_s < 10 else 10.0 if a.at_s < 20 else 600.0
        found.setdefault((a.tier, start_s), []).append((a.input_tokens, a.output_tokens))
    assert {key: len(lengths) for key, lengths in found.items()} == {
        ("small", 0.0): 40,
        ("large", 0.0): 5,
        ("large", 10.0): 7,
        ("small", 600.0): 90,
    }
    assert max(a.at_s for a in arrivals) < 660
    small = found["small", 0.0]
    assert sum(prompt for prompt, _ in small) == pytest.approx(40 * 70.5, abs=1)
    assert sum(answer for _, answer in small) == pytest.approx(40 * 11, rel=0.02)
    assert len({prompt for prompt, _ in small}) > 20, "they are not all alike"
    assert sum(answer for _, answer in found["large", 0.0]) == pytest.approx(5 * 128, abs=3)
    assert min(answer for _, answer in found["small", 600.0]) == 1
    assert list(read_trace(tmp_path / "trace")) == arrivals
    assert list(read_trace(tmp_path / "trace", seed=1)) != arrivals


def test_own_windows_in_part(tmp_path: Path) -> None:
    path = written(tmp_path, OWN)
    late = list(read_trace(path, skip_hours=0.1))
    assert len(late) == 90
    assert all(240 <= a.at_s < 300 for a in late)
    assert len(list(read_trace(path, hours=0.1))) == 52
    assert 40 < len(list(read_trace(path, keep_ratio=0.5))) < 100


@pytest.mark.parametrize("requests", ["-1", "10000001", "many", "1.5", ""])
def test_own_windows_with_an_invalid_number_of_requests(tmp_path: Path, requests: str) -> None:
    path = written(tmp_path, f"start_s,seconds,tier,requests\n0,10,small,{requests}\n")
    with pytest.raises(SetupError, match="line 2"):
        list(read_trace(path))
