"""Cores and NUMA nodes that ranks may run on."""

import os
from dataclasses import replace

import pytest

from fedmpi import binding
from fedmpi.binding import Bound, bound, collisions, nodes_of, numa, told
from fedmpi.comm.threads import on_ranks

ONE = Bound(0, "h", "m", (0,), 4, ("0",), 1)


def on(rank, *cores, host="h", num=4, nodes=("0",), num_nodes=1):
    return Bound(rank, host, f"machine {host}", cores, num, nodes, num_nodes)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([on(0, 0, 1, 2, 3), on(1, 0, 1, 2, 3)], ""),
        ([on(0, 0), on(1, 1)], "bound to 1 of 4 cores each"),
        ([on(0, 0), on(1, 1, 2)], "bound to 1-2 of 4 cores each"),
        (
            [on(0, 0, 1, num_nodes=2), on(1, 2, nodes=("1",), num_nodes=2)],
            "bound to 1-2 of 4 cores each, on one NUMA node",
        ),
        ([on(0, 0, 2, nodes=("0", "1"), num_nodes=2)], "bound to 2 of 4 cores each, some across NUMA nodes"),
        ([on(0, 0), on(1, 1, host="g", num=64)], "bound to 1 of 4-64 cores each"),
        ([on(0), on(1, 1)], ""),
    ],
)
def test_binding_is_told_in_short(rows, says):
    assert told(rows) == says


def test_ranks_on_one_core_are_told_where_others_are_free():
    assert collisions([on(0, 3), on(1, 3)]) == []  # as many as there are
    assert collisions([on(0, 3), on(1, 3, host="g")]) == []
    assert collisions([on(0, 3), on(1, 2), on(2, 1, 2)]) == []
    [line] = collisions([on(0, 3), on(1, 3), on(2, 1, 2)])
    assert line.startswith(
        "host h: ranks 0 and 1 are both bound to core 3, and others are free; use mpirun --map-by core"
    )


def test_each_rank_says_what_it_may_run_on(monkeypatch, tmp_path):
    for node, cores in (("node0", "0-1,4"), ("node1", "2-3\n"), ("node2", "")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cores)
    (tmp_path / "nodelist").mkdir()
    monkeypatch.setattr(binding, "_NODES", tmp_path)
    monkeypatch.setattr(binding, "my_cores", lambda: [1, 2])
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert numa() == {"0": [0, 1, 4], "1": [2, 3], "2": []}
    assert nodes_of([4], numa()) == ["0"]
    rows = on_ranks(2, bound)[1]
    assert [row.rank for row in rows] == [0, 1]
    assert all(
        replace(row, host="h", machine="m", rank=0)
        == replace(ONE, cores=(1, 2), cores_of_host=5, nodes=("0", "1"), num_nodes=3)
        for row in rows
    )
    monkeypatch.setattr(binding, "_NODES", tmp_path / "none")
    assert numa() == {}
