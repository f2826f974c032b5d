"""Every algorithm follows its paper, in float64: on one rank in this process, on two and four with equal results."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.equations import check
from support.mpi import launch
from support.programs.equations import CASES

from fedmpi.comm import SoloComm


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equations")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A case's result in this process, computed once for all tests."""
    return functools.cache(lambda case: check(CASES[case], str(tmp_path_factory.mktemp("alone")), SoloComm()))


@pytest.mark.parametrize("case", CASES)
def test_is_the_papers(case: str, alone: Callable[[str], Any]) -> None:
    alone(case)


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.mpi
def test_the_same_numbers_on_several_ranks(case: str, n: int, folder: Path, alone: Callable[[str], Any]) -> None:
    found = np.array(launch("equations", n, str(folder), timeout_s=300).check(case))
    assert np.abs(found - np.array(alone(case))).max() < 1e-12
