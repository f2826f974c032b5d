"""Deadlines on three ranks: one launch of programs/late.py."""

import pytest
from support.mpi import Report, launch
from support.programs.late import CASES


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return launch("late", 3, str(tmp_path_factory.mktemp("late")), timeout_s=120)


@pytest.mark.parametrize("case", CASES)
def test_late_silos(report: Report, case: str) -> None:
    report.check(case)
