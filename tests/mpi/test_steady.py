"""Rounds after the first few allocate nothing of the model's size, and a run's memory does not grow."""

import json
from pathlib import Path

import pytest
from support.mpi import PYTHON, mpirun

JOB = Path(__file__).parents[2] / "jobs" / "bench" / "steady.py"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    done = mpirun(2, PYTHON, str(JOB), "--params", "3e5", "--rounds", "100", timeout_s=240)
    assert done.rc == 0, done.tails
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]  # mpirun may color the last


def test_an_exchange_touches_no_fresh_memory_of_the_vector_s_size(rows: list[dict]) -> None:
    # MPI_Allreduce of a block allocates scratch memory each time: a whole vector, if vectors are one block.
    fresh = {row["exchange"]: row["fresh_memory"] for row in rows if "replicated" not in row["exchange"]}
    assert len(fresh) >= 6 and max(fresh.values()) < 0.15, fresh


def test_ranks_do_not_grow_from_round_to_round(rows: list[dict]) -> None:
    grown = {row["exchange"]: row["growth_bytes"] for row in rows}
    assert max(grown.values()) < 600_000, grown  # over 90 rounds


def test_rounds_under_masks_are_measured_beside_plain_ones() -> None:
    done = mpirun(2, PYTHON, str(JOB), "--quick", "--secure", "{plan: sharded}", timeout_s=120)
    assert done.rc == 0, done.tails
    row = next(json.loads(line) for line in done.out.splitlines() if line.startswith("{"))
    assert row["secure_x"] == pytest.approx(row["round_s"] / row["plain_round_s"], rel=1e-2) and row["round_s"] > 0
