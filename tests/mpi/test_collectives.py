"""The communicator against numpy, on 1 to 4 ranks: one launch each, of programs/collectives.py."""

import pytest
from support.mpi import launch
from support.programs.collectives import CASES, LARGE


@pytest.mark.parametrize("n", (1, 2, 3, 4))
@pytest.mark.parametrize("case", CASES)
def test_collectives(n: int, case: str) -> None:
    launch("collectives", n).check(case)


@pytest.mark.parametrize("case", LARGE)
def test_large(case: str) -> None:
    launch("collectives", 2).check(case)


@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_no_rank_is_left(n: int) -> None:
    done = launch("collectives", n).done
    assert done.rc == 0, done.tails
