"""Asynchronous rounds in real time on three ranks: two launches of programs/arrivals.py, a short one and a long one."""

import pytest
from support.mpi import Report, launch
from support.programs.arrivals import CASES

SHORT = ("a_slow_silo_does_not_make_the_others_wait", "a_replay_gives_the_same_bits_on_any_number_of_ranks")
SHORT = (*SHORT, "the_order_of_arrivals_is_on_disk", "a_silo_that_raises_ends_all_ranks_with_its_name")
SHORT = (*SHORT, "so_it_does_with_work_by_measured_delays")


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return launch("arrivals", 3, str(tmp_path_factory.mktemp("arrivals")), *SHORT, timeout_s=120)


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory) -> Report:
    others = [name for name in CASES if name not in SHORT]
    return launch("arrivals", 3, str(tmp_path_factory.mktemp("arrivals")), *others, timeout_s=200)


@pytest.mark.parametrize("case", SHORT)
def test_arrivals(short: Report, case: str) -> None:
    short.check(case)


@pytest.mark.parametrize("case", [name for name in CASES if name not in SHORT])
def test_other_arrivals(long: Report, case: str) -> None:
    long.check(case)
