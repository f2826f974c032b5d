"""Runs under masks on several ranks: one launch each of programs/secure.py; and ranks that die."""

import json
from pathlib import Path

import pytest
from support.mpi import PROGRAMS, PYTHON, Report, launch, launcher, mpirun
from support.programs.secure import CASES
from support.runs import run

from fedmpi.config import load
from fedmpi.flat import sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return launch("secure", 4, str(tmp_path_factory.mktemp("secure")), timeout_s=240)


@pytest.mark.parametrize("case", CASES)
def test_under_masks(report: Report, case: str) -> None:
    report.check(case)


def test_a_round_in_which_a_rank_dies_is_repeated_with_new_keys_and_the_same_bits(tmp_path: Path) -> None:
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    how = ["rounds=4", "local.epochs=1", "device.name=cpu", "secure=secagg", "updates=[{name: clip, norm: 1.0}]"]
    how += ["on_failure=adopt", "exchange.plan=sharded", "server.optimizer=fedadam"]
    command = (PYTHON, str(PROGRAMS / "heal.py"), str(tmp_path / "died"), "0:2:exchange", *how)
    done = mpirun(3, "--with-ft", "ulfm", *command, cwd=ROOT, timeout_s=120)
    (row,) = [json.loads(line) for line in done.out.splitlines() if line[:1] == "{"]
    config = load(str(ROOT / "configs" / "digits.yaml"), [f"out={tmp_path / 'whole'}", *how])[0]
    assert row["ranks"] == 2 and row["seen"] == [1, 2, 3, 4], done.tails
    assert row["sha256"] == sha256(run(config)[1].parameters), done.tails
