from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from controlplane.core.domain.request import Complexity, Priority
from controlplane.errors import SetupError
from controlplane.simulation.traces import read_trace

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
        ('{"timestamp": 0}\n', "line 1"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\nnonsense\n', "line 2"),
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
