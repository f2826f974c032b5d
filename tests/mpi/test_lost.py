"""A rank that dies, under an MPI that can go on without it."""

import json

import pytest
from support.mpi import PROGRAMS, PYTHON, launcher, mpirun


def test_the_ranks_that_are_left_are_told_who_is_lost_and_go_on() -> None:
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    done = mpirun(3, "--with-ft", "ulfm", PYTHON, str(PROGRAMS / "lost.py"))
    rows = sorted((json.loads(line) for line in done.out.splitlines() if line[:1] == "{"), key=lambda row: row["rank"])
    common = {"lost": [1], "sum": [2.0]}
    assert rows == [common | {"rank": 0, "left": [0, 2]}, common | {"rank": 2, "left": [1, 2]}], done.tails
