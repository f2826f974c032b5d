"""Whole runs on 1, 2 and 4 ranks: one launch each, of programs/training.py.

Figures that must not depend on the number of ranks are compared across launches.
"""

from pathlib import Path

import pytest
from support.mpi import Report, launch
from support.programs.training import CASES, RUNS

RANKS = (1, 2, 4)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def reports(folder: Path) -> dict[int, Report]:
    """Each launch resumes the run of the one before, on more or fewer ranks."""
    order = [2, 4, 1]
    before = [[], *([str(n)] for n in order)]
    return {n: launch("training", n, str(folder), *last, timeout_s=300) for n, last in zip(order, before, strict=False)}


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_training(reports: dict[int, Report], n: int, case: str) -> None:
    reports[n].check(case)


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_on_any_number_of_ranks(reports: dict[int, Report], name: str) -> None:
    shas = {n: report.check(f"reproducible_{name}") for n, report in reports.items()}
    assert len(set(shas.values())) == 1, shas
    assert len({report.check(f"reproducible_{other}") for other in RUNS for report in reports.values()}) == len(RUNS)


@pytest.mark.parametrize("name", ("personal_bias", "fedadam", "codecs", "average"))
def test_resumed_on_other_ranks_ends_with_the_undisturbed_bits(reports: dict[int, Report], name: str) -> None:
    shas = {n: report.check(f"resumes_on_other_ranks_{name}") for n, report in reports.items()}
    assert shas.pop(2) is None  # the first launch has nothing to resume
    assert set(shas.values()) == {reports[1].check(f"reproducible_{name}")}, shas


def test_silos_that_change_ranks_after_every_round_change_no_bit(reports: dict[int, Report]) -> None:
    shas = {report.check("silos_that_change_ranks_change_no_bit") for report in reports.values()}
    assert shas == {reports[1].check("reproducible_personal_bias")}


def test_figures_of_all_have_the_same_bits_on_any_number_of_ranks(reports: dict[int, Report]) -> None:
    case = "figures_of_all_have_the_same_bits_on_any_number_of_ranks"
    assert len({report.check(case) for report in reports.values()}) == 1


def test_a_dedicated_server_changes_no_bit(reports: dict[int, Report]) -> None:
    shas = {reports[n].check("dedicated_server_hosts_nothing") for n in RANKS[1:]}
    assert shas == {reports[1].check("reproducible_digits")}


@pytest.mark.parametrize("n", RANKS)
def test_no_rank_is_left(reports: dict[int, Report], n: int) -> None:
    assert reports[n].done.rc == 0, reports[n].done.tails
