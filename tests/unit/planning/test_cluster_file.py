"""Clusters described in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.core.placement.topology import islands, numa_groups
from controlplane.errors import ConfigError
from controlplane.planning.cluster_file import load_cluster

GOOD = """
node_types:
  - {name: big, gpu: h100-80g, gpus: 8, nvlink_island: 4, sockets: 2, cpus: 96.5, memory_gib: 512}
  - {name: odd, gpu: Homemade, gpus: 1, gpu_memory_gib: 10, cpus: 4, memory_gib: 16}
  - {name: plain, cpus: 32, memory_gib: 64}
nodes:
  - {type: big, count: 2, broken_gpus: {3: XID 79}}
  - {type: odd, name: lab, cordoned: being repaired}
  - {type: plain}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_nodes_as_described(tmp_path: Path) -> None:
    file = load_cluster(write(tmp_path, GOOD))
    nodes = {node.node_id: node for node in file.to_nodes()}
    assert list(nodes) == ["big-0", "big-1", "lab", "plain-0"]
    big = nodes["big-1"]
    assert (big.cpu_milli, big.memory_bytes, big.node_type) == (96_500, 512 * 2**30, "big")
    assert islands(big.gpus) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert numa_groups(big.gpus) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert {gpu.model for gpu in big.gpus} == {"H100-80G"}
    assert big.gpus[0].memory_bytes > 79 * 2**30 - 2**30
    assert [gpu.index for gpu in big.gpus if gpu.unavailable] == [3]
    lab = nodes["lab"]
    assert (lab.unavailable, lab.gpus[0].model, lab.gpus[0].memory_bytes) == (
        "being repaired",
        "Homemade",
        10 * 2**30,
    )
    assert nodes["plain-0"].gpus == ()
    kind = file.type_named("odd")
    assert kind is not None
    assert kind.node("x").node_id == "x"
    assert file.type_named("nothing") is None


def test_every_problem_at_once(tmp_path: Path) -> None:
    text = """
node_types:
  - {name: a, gpu: Homemade, gpus: 1, cpus: 4, memory_gib: 16}
  - {name: b, gpus: 2, cpus: 4, memory_gib: 16}
  - {name: c, cpus: many, memory_gib: 16}
nodes: []
"""
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, text))
    shown = str(caught.value)
    for part in ("'Homemade' is not in the table", "node_types[1].gpu: missing", "node_types[2].cpus"):
        assert part in shown


def test_one_problem_is_one_line(tmp_path: Path) -> None:
    text = "node_types: [{name: vm, cpus: 8}]\nnodes: [{type: vm}]\n"
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, text))
    assert [problem.path for problem in caught.value.problems] == ["node_types[0].memory_gib"]
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, "node_types: [{name: vm, cpus: 8}]\n"))
    assert sorted(problem.path for problem in caught.value.problems) == ["node_types[0].memory_gib", "nodes"]


def test_names_must_be_unique_and_known(tmp_path: Path) -> None:
    text = GOOD + "  - {type: biggest}\n  - {type: big}\n"
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, text))
    assert "'biggest' is not a node type (there is big, odd, plain)" in str(caught.value)
    assert "two nodes are named 'big-0'" in str(caught.value)
    twice = GOOD.replace("name: odd", "name: big").replace("{type: odd, name: lab", "{type: big, name: lab")
    with pytest.raises(ConfigError, match="two are named 'big'"):
        load_cluster(write(tmp_path, twice))
