"""The exceptions, as a tree, with the exit code of the command for each.

An `agreed` error is raised by every rank at the same place. The ranks then end together and can still write their last
checkpoint. Any other error may be one rank's alone, while the others wait for it in a collective. That rank enters no
further collective and ends the job.

FedmpiError                 exit 1
├── ConfigError             exit 2   the user's configuration, data or machine does not fit; nothing was lost
│   └── DataMissing         exit 2   a dataset's files are not there; the message says which to put where
├── SiloError               exit 1   a silo raised; carries rank, silo and traceback
├── Diverged                exit 1   every update of a round was rejected, or loss or norms explode
├── NoCohort                exit 1   a round has no silo to train; the rounds before are on disk
├── ExchangeError           exit 1   ranks disagree about what they exchange
├── RankLost                exit 1   other ranks have died; carries which
├── CommTimeout             exit 1   a wait for other ranks took too long; carries which were silent
├── CheckpointError         exit 1   a checkpoint could not be written or read
├── FolderError             exit 1   the shared folder of jobs could not be read or written for too long
├── Superseded              exit 1   a newer start of the same server or silo has taken over
├── ServerEnded             exit 1   the server's job has ended with an error, which its silos learn of
└── Stopped                 exit 3   a signal or `fedmpi stop`; the last whole round is on disk
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import TypeVar

E = TypeVar("E", bound="FedmpiError")


class FedmpiError(Exception):
    """Base class of all errors that fedmpi raises on purpose."""

    exit_code = 1
    agreed = False  # whether every rank raises it at the same place


def agreed(error: E) -> E:
    """Mark an error as agreed: it follows from what all ranks know, such as sums, gathered rows or the configuration.

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
    """A silo raised an exception; every rank learns of it and ends."""


class Diverged(FedmpiError):
    """No update of a round was usable, or the run diverges (health.py)."""


class NoCohort(FedmpiError):
    """A round has no silo to train, or its selector chose an unknown one. The state is that of the round before."""


class ExchangeError(FedmpiError):
    """Ranks hold different rounds, plans, lengths, types or results."""


class RankLost(FedmpiError):
    """Other ranks have died; `ranks` are those that are known.

    >>> print(RankLost([3, 1]), RankLost([]), sep="; ")
    lost ranks 1, 3; lost a rank, and it is not known which
    """

    def __init__(self, ranks: Sequence[int], why: str = "") -> None:
        self.ranks = tuple(sorted(ranks))
        what = f"lost {ranks_text(self.ranks)}" if ranks else "lost a rank, and it is not known which"
        super().__init__(f"{what}: {why}" if why else what)


class CommTimeout(FedmpiError):
    """A wait for other ranks took too long. `ranks` are the silent ones; none if all ranks are alive but wait for
    different things."""

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks = tuple(sorted(ranks))
        super().__init__(why)


class CheckpointError(FedmpiError):
    """A checkpoint could not be written, or none of those found can be used."""


class FolderError(FedmpiError):
    """The shared folder of jobs cannot be read or written, or holds what it should not."""


class Superseded(FedmpiError):
    """A newer start of the same server or silo has taken over; this one writes nothing more."""


class ServerEnded(FedmpiError):
    """The server's job of a federation of jobs has ended with an error; this silo's job ends, too."""


class Stopped(FedmpiError):
    """The run ends early on request: a signal or `fedmpi stop`."""

    exit_code = 3


def in_one_line(error: BaseException) -> str:
    """An exception of a user's code in one line: type, the first 200 characters of its text, and the place that raised
    it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({last.filename}, line {last.lineno})"


def ranks_text(ranks: Sequence[int]) -> str:
    """The ranks as text for a message; at most eight numbers.

    >>> ranks_text([0, 2])
    'ranks 0, 2'
    """
    head = ", ".join(str(r) for r in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {head}{', ...' if len(ranks) > 8 else ''}"
