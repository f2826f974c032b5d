"""A rank that dies, under an MPI that survives it."""

import json

import pytest
from support.mpi import PROGRAMS, PYTHON, launcher, mpirun


def test_the_ranks_that_are_left_are_told_who_is_lost_and_go_on() -> None:
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    done = mpirun(3, "--with-ft", "ulfm", PYTHON, str(PROGRAMS / "lost.py"))
    rows = sorted((json.loads(line) for line in done.out.splitlines() if line[:1] == "{"), key=lambda row: row["rank"])
    assert [(row["rank"], row["left"], row["sum"]) for row in rows] == [(0, [0, 2], [2.0]), (2, [1, 2], [2.0])], (
        done.tails
    )
    # A rank that learns of it from another's `shrink` need not know who is lost.
    assert [1] in (told := [row["lost"] for row in rows]) and all(lost in ([1], []) for lost in told), done.tails


DIES = """
import os, signal, time
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    time.sleep(float(os.environ["LATER_S"]))
    os.kill(os.getpid(), signal.SIGKILL)
from fedmpi.comm import connect
print(connect().size)
"""


@pytest.mark.parametrize("later_s", ["0", "2"])
def test_a_rank_that_dies_before_mpi_has_started_ends_the_job(later_s) -> None:
    """The others would wait for it in MPI_Init, before or after they have seen it there."""
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    done = mpirun(3, "--with-ft", "ulfm", PYTHON, "-c", DIES, env={"LATER_S": later_s}, timeout_s=40)
    assert done.rc != 0 and done.out == "", done.tails
    assert "fedmpi: a rank died before MPI had started; the job ends" in done.err, done.tails
