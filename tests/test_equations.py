"""Every algorithm is its paper's, in float64: on one rank in this process, on two and four with the same numbers."""

from pathlib import Path

import numpy as np
import pytest
from equations import check
from mpi import launch
from programs.equations import CASES

from fedmpi.comm import Solo


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equations")


@pytest.mark.parametrize("case", CASES)
def test_is_the_papers(case: str, tmp_path: Path) -> None:
    check(CASES[case], str(tmp_path), Solo())


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_on_several_ranks(case: str, n: int, folder: Path, tmp_path: Path) -> None:
    found = np.array(launch("equations", n, str(folder)).check(case))
    alone = np.array(check(CASES[case], str(tmp_path), Solo()))
    assert np.abs(found - alone).max() < 1e-12
