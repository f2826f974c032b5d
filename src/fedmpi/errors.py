"""What can go wrong, as a tree; the command's exit code is written on each branch.

An error that every rank raises, at the same place, is `agreed`: ranks then end together, and may still write their last
checkpoint. Any other one may be a single rank's own, while the rest waits for it in a collective: that rank enters no
collective any more, and ends the job.

FedmpiError                 exit 1
├── ConfigError             exit 2   the user's configuration, data or machine does not fit; nothing was lost
│   └── DataMissing         exit 2   a dataset's files are not there; the message says which to put where
├── SiloError               exit 1   a silo raised; carries rank, silo and traceback
├── Diverged                exit 1   every update of a round was rejected, or loss or norms explode
├── NoCohort                exit 1   a round has no silo to train; the rounds before are on disk
├── ExchangeError           exit 1   ranks disagree about what they exchange
├── RankLost            exit 1   other ranks are gone; carries which
├── CommTimeout         exit 1   other ranks were waited for, for too long; carries which were silent
├── CheckpointError         exit 1   a checkpoint could not be written or read
└── Stopped                 exit 3   a signal or `fedmpi stop`; the last whole round is on disk
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

E = TypeVar("E", bound="FedmpiError")


class FedmpiError(Exception):
    """Anything fedmpi says no to."""

    exit_code = 1
    agreed = False  # does every rank raise it, at the same place?


def agreed(error: E) -> E:
    """The error, for `raise` where it follows from what all ranks know alike: sums, gathered rows, the configuration.

    >>> agreed(FedmpiError("no silo is left")).agreed
    True
    """
    error.agreed = True
    return error


class ConfigError(FedmpiError):
    """Bad configuration or missing input: one clear line, before anything runs."""

    exit_code = 2


class DataMissing(ConfigError):
    """A dataset's files are not where they were looked for."""


class SiloError(FedmpiError):
    """A silo raised while it worked; every rank learns of it and ends."""


class Diverged(FedmpiError):
    """No update of a round was usable, or the run no longer learns (health.py)."""


class NoCohort(FedmpiError):
    """A round has no silo to train, or its selector chose what is none; the state is that of the round before."""


class ExchangeError(FedmpiError):
    """Ranks hold different rounds, plans, lengths, types or results."""


class RankLost(FedmpiError):
    """Other ranks are gone; `ranks` are those that are known.

    >>> print(RankLost([3, 1]), RankLost([]), sep="; ")
    lost ranks 1, 3; lost a rank, and it is not known which
    """

    def __init__(self, ranks: Sequence[int], why: str = "") -> None:
        self.ranks = tuple(sorted(ranks))
        what = f"lost {ranks_text(self.ranks)}" if ranks else "lost a rank, and it is not known which"
        super().__init__(f"{what}: {why}" if why else what)


class CommTimeout(FedmpiError):
    """Other ranks were waited for, for too long; `ranks` are those that were silent, none where all are there but do
    not wait for the same thing."""

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks = tuple(sorted(ranks))
        super().__init__(why)


class CheckpointError(FedmpiError):
    """A checkpoint could not be written, or none of those found can be used."""


class Stopped(FedmpiError):
    """The run ends early because somebody asked it to."""

    exit_code = 3


def ranks_text(ranks: Sequence[int]) -> str:
    """Their names in a message.

    >>> ranks_text([0, 2])
    'ranks 0, 2'
    """
    head = ", ".join(str(r) for r in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {head}{', ...' if len(ranks) > 8 else ''}"
