"""A rank that sits rounds out evaluates, and later trains from, the newest parameters."""

import json
from pathlib import Path

from support.mpi import PYTHON, mpirun

PROGRAM = Path(__file__).parents[1] / "support" / "programs" / "held.py"


def test_large_models_have_the_bits_of_small_ones_under_partial_participation(tmp_path: Path) -> None:
    done = mpirun(3, PYTHON, str(PROGRAM), str(tmp_path), timeout_s=200)
    assert done.rc == 0, done.tails
    rows = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert {row["plan"] for row in rows} == {"shared_memory", "root", "sharded", "fragments", "replicated"}
    assert all(row["same"] and row["rounds"] == 5 for row in rows), rows
