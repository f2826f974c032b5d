"""Errors that all ranks raise alike, and those that only one rank raises."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError, FedmpiError, NoCohort, SiloError, agreed
from fedmpi.outcome import RoundOutcome
from fedmpi.records import StatusTable
from fedmpi.rounds import READY_RANK, READY_SILO
from fedmpi.rounds.agreement import REFUSED, agree_ready
from fedmpi.rounds.cohort import select_cohort
from fedmpi.rounds.policies import Everybody


class Pair(SoloComm):
    """Rank 1 of two whose other rank is absent: a collective would wait for ever."""

    rank, size, fatal = 1, 2, (MemoryError,)

    def share(self, values, meanwhile=None):
        raise AssertionError("a collective was entered")


class Echo(Pair):
    """Rank 1 of two that both say the same."""

    def share(self, values, meanwhile=None):
        return np.repeat(values[-1:], 2) if values.shape == (2,) else values

    def gather(self, row):
        return [row, row]


def test_only_an_error_that_is_agreed_can_be_followed_by_a_collective():
    one, two = SoloComm(), Pair()
    for error in (FedmpiError("mine"), NoCohort("mine"), LookupError("mine"), KeyboardInterrupt()):
        assert one.alike(error) and not two.alike(error)
    assert two.alike(agreed(NoCohort("everybody's")))


def test_without_memory_a_rank_agrees_with_nobody():
    def work():
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        Pair().collectively(work)


def test_what_is_raised_together_is_agreed():
    def work():
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing") as caught:
        Echo().collectively(work)
    assert caught.value.agreed


def federation(comm, select):
    told = []
    return SimpleNamespace(
        comm=comm,
        ids=["a"],
        seed=0,
        private=None,
        index={"a": 0},
        selector=SimpleNamespace(
            select=select, observe=lambda ids, state, outcome: state, candidates=lambda *known: []
        ),
        ready=StatusTable(comm.size, READY_RANK, 1, READY_SILO),
        watch=SimpleNamespace(tell=lambda *news: told.append(news)),
        exchange=SimpleNamespace(fingerprint=lambda cohort: 0.0),
    )


def no_silo(*_):
    raise NoCohort("no silo is there")


def test_a_selector_that_says_no_enters_no_collective_of_its_own():
    state = SimpleNamespace(selector={}, outcome=None)
    assert str(select_cohort(state, federation(Pair(), no_silo), 1)[2]) == "no silo is there"


@pytest.mark.parametrize(("others", "kind"), [(REFUSED, NoCohort), (0, SiloError)])
def test_what_selectors_say_no_to_is_raised_alike(others, kind):
    fed = federation(Echo(), no_silo)
    fed.comm.broadcast_text = lambda text, speaker: text
    fed.ready.set_rank(0, status=others)
    fed.ready.set_rank(1, status=REFUSED)
    with pytest.raises(kind, match="no silo is there") as caught:
        agree_ready(fed, RoundOutcome.of(fed.ids, 1), Everybody(), NoCohort("no silo is there"))
    assert caught.value.agreed
