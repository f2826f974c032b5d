"""`exchange.overlap` on 1, 2 and 4 ranks: one launch each, of programs/overlap.py; and with the command."""

import os
import signal
from pathlib import Path

import pytest
from support.mpi import Report, launch
from support.programs.overlap import CASES
from support.programs.place import STEPS, TEN_MINUTES, Place, own_lines

RANKS = (1, 2, 4)
LATE = ("exchange.overlap=true", 'server.optimizer={name: "mine:Late"}')  # STEP_S and STEP_ODD select the fault


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlap")


@pytest.fixture(scope="session")
def reports(folder: Path) -> dict[int, Report]:
    """Each launch resumes the run of the one before, on more or fewer ranks."""
    order = [2, 4, 1]
    before = [[], *([str(n)] for n in order)]
    return {n: launch("overlap", n, str(folder), *last, timeout_s=240) for n, last in zip(order, before, strict=False)}


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_overlap(reports: dict[int, Report], n: int, case: str) -> None:
    reports[n].check(case)


@pytest.mark.parametrize("case", ["reproducible_under_every_plan", "reproducible_with_codecs", "undisturbed"])
def test_same_bits_on_any_number_of_ranks(reports: dict[int, Report], case: str) -> None:
    shas = {n: report.check(case) for n, report in reports.items()}
    assert len(set(shas.values())) == 1, shas


@pytest.mark.parametrize(
    ("case", "like"),
    [
        ("a_dedicated_server_changes_no_bit", "reproducible_under_every_plan"),
        ("more_rounds_go_on_as_if_the_last_had_not_been", "reproducible_under_every_plan"),
        ("resumes_on_other_ranks", "reproducible_under_every_plan"),
        ("resumes_on_other_ranks_with_codecs", "reproducible_with_codecs"),
        ("stopped_while_an_exchange_is_under_way", "undisturbed"),
        ("all_rejected_while_an_exchange_is_under_way", "undisturbed"),
        ("a_silo_raises_while_an_exchange_is_under_way", "undisturbed"),
    ],
)
def test_ends_with_the_undisturbed_bits(reports: dict[int, Report], case: str, like: str) -> None:
    shas = {n: report.check(case) for n, report in reports.items()}
    if case.startswith("resumes"):
        assert shas.pop(2) is None  # the first launch has nothing to resume
    assert set(shas.values()) == {reports[1].check(like)}, shas


@pytest.mark.parametrize("n", RANKS)
def test_no_rank_is_left(reports: dict[int, Report], n: int) -> None:
    assert reports[n].done.rc == 0, reports[n].done.tails


def test_signal_while_an_exchange_is_under_way(place: Place) -> None:
    """Exit 3 once it has arrived; on other ranks the run continues to the bits of an uninterrupted one."""
    assert place.train(2, "late", *LATE).rc == 0
    with place.start(2, "late-stop", *LATE, **TEN_MINUTES, AFTER=str(STEPS), STEP_S="6") as job:
        os.kill(place.busy(job, "late-stop")[1], signal.SIGUSR1)
        done = job.wait(30)
    assert done.rc == 3, done.tails
    stopped = "fedmpi: stopped in round 2: SIGUSR1 (rank 1); round 1 is on disk; the same command resumes"
    assert own_lines(done) == [stopped], done.tails
    done = place.train(3, "late-stop", *LATE)
    assert done.rc == 0 and "resumed after round 1" in done.out, done.tails
    assert place.sha("late-stop") == place.sha("late")


def test_what_only_one_ranks_thread_raises_ends_the_job(place: Place) -> None:
    done = place.train(3, "late-odd", *LATE, "local.steps=20", STEP_ODD="2")
    assert done.rc == 1, done.tails
    assert done.err.count("Traceback") == 1 and "rank 2 failed" in done.err and "odd step" in done.err, done.tails


def test_an_mpi_that_threads_may_not_call_is_refused(place: Place) -> None:
    done = place.train(2, "serialized", "exchange.overlap=true", MPI4PY_RC_THREAD_LEVEL="serialized")
    assert done.rc == 2, done.tails
    lines = own_lines(done)
    assert len(lines) == 1 and "exchange.overlap: needs an MPI that threads may call" in lines[0], done.tails
