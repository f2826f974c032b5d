"""Faults and warnings of a check: collected on every rank, told as one list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fedmpi.comm import Comm, ranks_text
from fedmpi.errors import FedmpiError, in_one_line

T = TypeVar("T")


@dataclass
class Findings:
    """What one rank found. Each text is one line that ends with what to do.

    >>> found = Findings()
    >>> found.attempt(lambda: 1 / 0, "model"), found.faults[0][:32]
    (None, 'model: ZeroDivisionError: divisi')
    """

    faults: list[str] = field(default_factory=list)  # training would refuse, fail, or learn nothing
    warnings: list[str] = field(default_factory=list)  # training works, but probably not as meant
    unseen: list[str] = field(default_factory=list)  # what was not looked at, and why

    def attempt(self, work: Callable[[], T], what: str) -> T | None:
        """The result of `work`, or None if it raises: then its error is a fault. `what` names the part of the
        configuration whose code may raise anything."""
        try:
            return work()
        except FedmpiError as error:
            self.fault(str(error))
        except Exception as error:  # of a user's code: a dataset, a model, a loss
            self.fault(f"{what}: {in_one_line(error)}")
        return None

    def fault(self, text: str) -> None:
        """Note a fault once."""
        if text not in self.faults:
            self.faults.append(text)

    def warn(self, text: str) -> None:
        """Note a warning once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def skip(self, text: str) -> None:
        """Note once what was not looked at."""
        if text not in self.unseen:
            self.unseen.append(text)


def at_first(comm: Comm, found: Findings, work: Callable[[Findings], object]) -> None:
    """Notes on every rank what `work` notes on rank 0. Collective."""
    mine = Findings()
    if comm.rank == 0:
        work(mine)
    told = comm.gather_values([mine.faults, mine.warnings, mine.unseen])[0]
    for note, texts in zip((found.fault, found.warn, found.skip), told, strict=True):
        for text in texts:
            note(text)


def merged(comm: Comm, mine: Findings) -> Findings:
    """The findings of all ranks, the same on every rank. Collective. A text that only some ranks found, and that names
    no silo, begins with these ranks."""
    rows = comm.gather_values([mine.faults, mine.warnings, mine.unseen])
    return Findings(*(_of_all([row[kind] for row in rows]) for kind in range(3)))


def _of_all(texts: Sequence[Sequence[str]]) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for rank, some in enumerate(texts):
        for text in some:
            ranks.setdefault(text, []).append(rank)
    alone = len(texts) == 1
    return [
        text if alone or len(some) == len(texts) or "silo '" in text else f"{ranks_text(some)}: {text}"
        for text, some in ranks.items()
    ]
