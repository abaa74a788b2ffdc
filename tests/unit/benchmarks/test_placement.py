"""The placement benchmark on small fleets, and its baselines against results computed by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.core.placement.gangs import Gang, GangShape
from controlplane.core.placement.topology import Gpu, Node
from tests.benchmarks.bench_placement import command
from tests.benchmarks.placement import gangs, optimum, policies, scale
from tests.benchmarks.placement.limit import limit_percent
from tests.benchmarks.placement.replay import POLICIES, replay
from tests.benchmarks.placement.trace import arrivals, fleet_milli, read_nodes, read_pods, shuffled

NODES = "sn,cpu_milli,memory_mib,gpu,model\na,32000,65536,4,T4\nb,96000,262144,8,V100\nc,8000,16384,0,\n"
PODS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec
p3,4000,8192,1,470,
p0,8000,16384,1,1000,T4|V100
p1,6000,12288,2,1000,V100
p2,2000,4096,0,0,
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    nodes, pods = tmp_path / "nodes.csv", tmp_path / "openb_pod_list_small.csv"
    nodes.write_text(NODES)
    pods.write_text(PODS)
    return nodes, pods


def test_files_are_read(files: tuple[Path, Path]) -> None:
    nodes, workload = read_nodes(files[0]), read_pods(files[1])
    assert [len(node.gpus) for node in nodes] == [4, 8, 0]
    assert fleet_milli(nodes) == 12_000
    assert workload.name == "small"
    assert [shape.total_milli for shape in workload.shapes] == [1000, 2000, 0, 470]
    assert workload.shapes[0].models == {"T4", "V100"}


def test_arrivals_request_130_percent(files: tuple[Path, Path]) -> None:
    shapes = read_pods(files[1]).shapes
    order = arrivals(shapes, 12_000, random.Random(1))
    requested = sum(shape.total_milli for shape in order)
    assert 15_600 - 2000 <= requested <= 15_600 + 1000
    assert set(shapes) == set(order[: len(shapes)])
    assert order == arrivals(shapes, 12_000, random.Random(1))
    assert sum(s.total_milli for s in arrivals(shapes, 1_000, random.Random(1))) <= 1_300
    nodes = read_nodes(files[0])
    orders = {
        tuple(n.node_id[6:] for n in sorted(shuffled(nodes, random.Random(i)), key=lambda n: n.node_id))
        for i in range(20)
    }
    assert len(orders) > 1
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_fills_a_small_fleet(files: tuple[Path, Path], policy: str) -> None:
    run = replay(read_nodes(files[0]), read_pods(files[1]), policy, 1)
    assert 60 < run.allocation_percent <= 100
    assert run == replay(read_nodes(files[0]), read_pods(files[1]), policy, 1)


def test_the_command(files: tuple[Path, Path], tmp_path: Path) -> None:
    published = tmp_path / "published.csv"
    published.write_text("workload,sc_policy,130\nopenb_pod_list_small,06-FGD,90.0\n")
    args = ["--nodes", str(files[0]), "--pods", str(tmp_path), "--seeds", "2", "--published", str(published)]
    result = CliRunner().invoke(command, [*args, "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["policy"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == list(POLICIES)
    assert {"policy", "workload", "seeds", "allocation_percent", "stddev"} <= set(rows["tierplane"])
    assert rows["fgd"]["published_percent"] == 90.0
    assert rows["tierplane"]["published_percent"] is None
    table = CliRunner().invoke(command, [*args[:4], "--seeds", "1", "--policy", "bestfit"])
    assert "bestfit" in table.stdout
    missing = CliRunner().invoke(command, ["--table", "trace"])
    assert missing.exit_code == 2


def node(name: str, free_cpu: int, gpus: int = 2) -> Node:
    return Node(name, tuple(Gpu(f"{name}/{i}", i, "M") for i in range(gpus)), free_cpu, 2**40)


def test_fgd_fills_a_partly_used_gpu_before_an_idle_one() -> None:
    half, whole = GangShape(milli_gpu=500), GangShape()
    fgd = policies.Fgd([node("a", 8000), node("b", 8000)], [half, whole, whole])
    assert fgd.place(half)
    assert fgd.place(half)
    assert fgd.capacity.free_milli.tolist() == [[0, 1000], [1000, 1000]]
    assert all(fgd.place(whole) for _ in range(3))
    assert not fgd.place(half)


def test_best_fit_takes_the_tightest_node() -> None:
    best = policies.BestFit([node("a", 64000, 4), node("b", 8000)])
    assert best.place(GangShape(milli_gpu=300))
    assert best.place(GangShape(milli_gpu=300))
    assert best.capacity.free_milli.tolist() == [[1000] * 4, [400, 1000, 0, 0]]


def test_gangs_in_islands_beat_counting_gpus() -> None:
    fleet = gangs.fleet(8)
    ours = gangs.run("tierplane", 0, fleet)
    assert ours[0] > gangs.run("random", 0, fleet)[0]
    assert ours[2] > 90


def test_planning_time_by_size(tmp_path: Path) -> None:
    points = list(scale.measure((80, 160), repeats=1))
    assert [point.gpus for point in points] == [80, 160]
    assert points[0].placed < points[1].placed
    assert "160 GPUs" in scale.chart(points)
    scale.svg(points, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


def test_plans_are_close_to_the_optimum() -> None:
    rows = list(optimum.table(8))
    assert float(str(rows[0]["of_optimum_percent"])) >= 97
    assert all(float(str(row["of_optimum_percent"])) <= 100 for row in rows)


def test_the_limit_of_a_mix() -> None:
    half, large, whole = GangShape(milli_gpu=500), GangShape(milli_gpu=810), GangShape(gpus=2)
    assert limit_percent([half, half, whole]) == pytest.approx(100)
    assert limit_percent([large]) == pytest.approx(81)
    assert limit_percent([large, GangShape(milli_gpu=190), GangShape(gpus=0)]) == pytest.approx(100)
    assert limit_percent([large, large, GangShape(milli_gpu=190)]) == pytest.approx(100 * 1.81 / 2)


def test_the_optimum_of_an_obvious_case() -> None:
    gang = [
        Gang("whole", GangShape(gpus=2)),
        Gang("a", GangShape(milli_gpu=600)),
        Gang("b", GangShape(milli_gpu=400)),
    ]
    assert optimum.optimum_milli(optimum.Case((node("n", 0),), tuple(gang))) == 2000
    assert optimum.optimum_milli(optimum.Case((node("n", 0),), tuple(gang[1:]))) == 1000
    assert optimum.optimum_milli(optimum.Case((node("n", 0, 1),), tuple(gang))) == 1000
