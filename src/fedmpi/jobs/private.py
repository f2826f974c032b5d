"""A silo's state between trainings, on its own side: the place in its data, what its rule keeps, its codec's residual.

    OUT/silos/ID/states/NUMBER.INCARNATION.h5    after training NUMBER of the job INCARNATION

The state is written before the update that belongs to it is published. Which of them counts, the server's commits say.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch

from fedmpi import disk, tensorfile
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.exchange.outbox import Outbox
from fedmpi.keeper import Silos
from fedmpi.local import LocalSilo
from fedmpi.state import StateTensor, under
from fedmpi.tensorfile import Table

Base = tuple[int, int]  # number of a training, incarnation of the job that did it
NOTHING: Base = (-1, 0)  # before the first training

OTHER_DATA = "silo '{}': its data differ from those that it was trained on before"

_DATA = ("data", "checksum")  # key of the checksum of the data that the silo was trained on
_NAME = re.compile(r"(\d+)\.(\d+)\.h5")


class States:
    """The stored states of one silo, with a checksum of its data: no other job learns that under `secure`."""

    def __init__(self, folder: Path, data: int) -> None:
        self.folder, self._data = folder, data
        try:
            disk.make_folder(folder)
            disk.remove_parts(folder)
        except OSError as error:
            raise ConfigError(f"out: cannot write into {folder}: {error.strerror or error}") from None

    def stored(self) -> list[Base]:
        """The trainings whose state is here, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(one[1]), int(one[2])) for one in found if one)

    def write(self, base: Base, silo: LocalSilo, exchange: Outbox | None) -> None:
        """Store the state after a training. Raises CheckpointError."""
        tensors = [
            *under("silo", Silos({silo.id: silo}).state()),
            *under("sent", () if exchange is None else exchange.drafted()),
            StateTensor(_DATA, torch.tensor(self._data)),
        ]
        try:
            tensorfile.write(self._path(base), [Table(one.key, one.tensor) for one in tensors])
        except OSError as error:
            raise CheckpointError(f"cannot write the silo's state into {self.folder}: {error}") from None

    def read(self, base: Base, silo: LocalSilo, exchange: Outbox | None) -> None:
        """Put a stored state into the silo and its exchange. Raises ConfigError if it is not here, or of other data."""
        if base not in self.stored():
            raise ConfigError(
                f"silo '{silo.id}' has trained {base[0]} times, and its state after that is not in {self.folder}; "
                "start it with the out= that it had"
            )
        tensors = tensorfile.read(self._path(base))
        if any(one.key == _DATA and int(one.tensor) != self._data for one in tensors):
            raise ConfigError(OTHER_DATA.format(silo.id))
        of_silo = [StateTensor(one.key[1:], one.tensor, "per_silo", silo.id) for one in tensors if one.key[0] == "silo"]
        of_sent = [StateTensor(one.key[1:], one.tensor, "per_silo", silo.id) for one in tensors if one.key[0] == "sent"]
        Silos({silo.id: silo}).restore(of_silo)
        if exchange is not None:
            exchange.holders.restore(of_sent)

    def drop(self, base: Base) -> None:
        """Remove the state of a training whose update does not count, if there is one."""
        self._path(base).unlink(missing_ok=True)

    def forget(self, answered: int, needed: Collection[Base]) -> None:
        """Remove the states of trainings up to this number, whose updates are answered, except the `needed` ones: those
        after updates that count. So none of updates that were dropped are left."""
        for base in self.stored():
            if base[0] <= answered and base not in needed:
                self._path(base).unlink(missing_ok=True)

    def _path(self, base: Base) -> Path:
        return self.folder / f"{base[0]:08d}.{base[1]:04d}.h5"
