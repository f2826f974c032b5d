"""`exchange.fragments` on 1, 2 and 3 ranks: one launch each, of programs/fragments.py."""

from pathlib import Path

import pytest
from support.mpi import Report, launch
from support.programs.fragments import CASES

RANKS = (1, 2, 3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fragments")


@pytest.fixture(scope="session")
def reports(folder: Path) -> dict[int, Report]:
    """Each launch resumes the run of the one before, on more or fewer ranks."""
    order = [2, 3, 1]
    before = [[], *([str(n)] for n in order)]
    launches = zip(order, before, strict=False)
    return {n: launch("fragments", n, str(folder), *last, timeout_s=240) for n, last in launches}


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_fragments(reports: dict[int, Report], n: int, case: str) -> None:
    reports[n].check(case)


@pytest.mark.parametrize(
    ("like", "cases"),
    [
        ("reproducible_under_every_plan", ("resumes_on_other_ranks", "a_rebuild_on_the_way_changes_no_bit")),
        ("reproducible_late", ("resumes_on_other_ranks_late",)),
        ("reproducible_with_codecs", ("resumes_on_other_ranks_with_codecs",)),
    ],
)
def test_same_bits_on_any_number_of_ranks(reports: dict[int, Report], like: str, cases: tuple[str, ...]) -> None:
    shas = {(case, n): report.check(case) for n, report in reports.items() for case in (like, *cases)}
    first = {key for key in shas if key[0].startswith("resumes") and key[1] == 2}  # has nothing to resume
    assert {shas.pop(key) for key in first} == {None}
    assert len(set(shas.values())) == 1, shas
