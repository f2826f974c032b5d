"""Regions on 1, 3 and 4 ranks: one launch each, of programs/regions.py."""

from pathlib import Path

import pytest
from support.mpi import launch
from support.programs.regions import CASES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("regions")


@pytest.mark.parametrize("n", (1, 3, 4))
@pytest.mark.parametrize("case", CASES)
def test_regions(folder: Path, n: int, case: str) -> None:
    launch("regions", n, str(folder)).check(case)
