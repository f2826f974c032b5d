"""Opens the silos of a run on the ranks that host them. Ranks tell each other sizes, checksums and column names; no
sample leaves its rank.

A checksum of the data must not give the data away. A CRC is linear: that of up to 32 binary targets determines all of
them. So checksums are pieces of SHA-256, that of the targets begins with the inputs, and under `secure` they stay on
their rank unless another rank may have to open the same data."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, agreed
from fedmpi.membership import Membership
from fedmpi.types import Silo, SiloData, Source, blocks

log = logging.getLogger("fedmpi")
T = TypeVar("T")

_SHOWN = 5  # most silos or columns in a message
NUM_FACTS = 5  # figures that identify a silo's data, F
CHECKSUMS = slice(2, 4)  # of these: of inputs and of targets
_BYTES = 6  # of a digest that a float64 holds exactly
_NOTHING: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True)
class Opened:
    """The opened data of the members."""

    members: Membership
    data: dict[str, SiloData]  # this rank's newly opened silos
    facts_KF: np.ndarray  # per member: numbers of training and test samples, checksums (0: not told)

    @property
    def num_train(self) -> list[int]:
        """Training samples of each member."""
        return [int(n) for n in self.facts_KF[:, 0]]

    @property
    def facts(self) -> dict[str, np.ndarray]:
        """`facts_KF` by silo id, each [F]."""
        return dict(zip(self.members.ids, self.facts_KF, strict=True))


def fingerprint(facts: np.ndarray) -> str:
    """A checksum of the facts of one silo or of all, eight hex digits."""
    return f"{zlib.crc32(np.ascontiguousarray(facts).tobytes()):08x}"


def open_silos(
    source: Source,
    members: Membership,
    comm: Comm,
    held: Collection[str] = (),
    known: Mapping[str, np.ndarray] = _NOTHING,
    hides: bool = False,
) -> Opened:
    """Open this rank's silos, except those that it already holds (`held`), and share the facts of all members' data.
    Collective.

    `known` are facts of silos that were open before, on any rank: their data must still be the same. `hides`: checksums
    of inputs and targets stay on their rank. Raises ConfigError with the faults of all silos on all ranks.
    """
    silos = [silo for silo in source.silos if silo.id in members.teams]
    mine = [silo for silo in silos if members.rank(silo.id) == comm.rank]
    agree_on_statistics(source, mine, comm)
    opened = comm.collectively(lambda: _all([silo for silo in mine if silo.id not in held], source))
    told = comm.collectively(lambda: {silo: facts_of(silo, data, source, known) for silo, data in opened.items()})
    facts_KF = np.zeros((len(silos), NUM_FACTS))
    for i, silo in enumerate(silos):
        if silo in mine:
            facts_KF[i] = told[silo.id] if silo.id in told else known[silo.id]
    checksums = facts_KF[:, CHECKSUMS].copy()
    if hides:
        facts_KF[:, CHECKSUMS] = 0.0
    facts_KF = comm.share(facts_KF.reshape(-1)).reshape(facts_KF.shape)
    if hides:
        facts_KF[:, CHECKSUMS] = checksums
    same_columns(facts_KF[:, 4], source, members, comm)
    if comm.rank == 0 and not facts_KF[:, 1].any():
        log.warning("no silo has test samples, so nothing is evaluated: give the data a test part")
    return Opened(members, opened, facts_KF)


def agree_on_statistics(source: Source, mine: Sequence[Silo], comm: Comm) -> None:
    """The statistics of all silos' training samples, if their preparation needs them and no run has them already.
    Collective; raises ConfigError with the faults of all silos on all ranks."""
    if (shared := source.shared) is not None and not shared.known:
        comm.collectively(lambda: _each(mine, lambda silo: shared.read(silo.id)))
        shared.agree(comm)


def _all(mine: Sequence[Silo], source: Source) -> dict[str, SiloData]:
    return dict(zip((silo.id for silo in mine), _each(mine, lambda silo: open_silo(silo, source)), strict=True))


def _each(mine: Sequence[Silo], work: Callable[[Silo], T]) -> list[T]:
    """What `work` returns for each silo. Raises ConfigError with the faults of all."""
    found, wrong = [], []
    for silo in mine:
        try:
            found.append(work(silo))
        except ConfigError as error:
            wrong.append(str(error))
    if wrong := list(dict.fromkeys(wrong)):
        more = f"; and {len(wrong) - _SHOWN} more silos of this rank" if len(wrong) > _SHOWN else ""
        raise ConfigError("; ".join(wrong[:_SHOWN]) + more)
    return found


def open_silo(silo: Silo, source: Source) -> SiloData:
    data = source.open(silo.id)
    if len(data.x_train) == 0:
        raise ConfigError(f"silo '{silo.id}' has no training samples")
    if silo.num_samples is not None and silo.num_samples != len(data.x_train):
        raise ConfigError(f"silo '{silo.id}' declares {silo.num_samples} training samples but has {len(data.x_train)}")
    for what, x in (("training", data.x_train), ("test", data.x_test)):
        if len(x) and tuple(x.shape[1:]) != tuple(source.shape):
            raise ConfigError(
                f"silo '{silo.id}': {what} samples have shape {tuple(x.shape[1:])}, the dataset's is {source.shape}"
            )
    return data


def facts_of(silo: str, data: SiloData, source: Source, known: Mapping[str, np.ndarray]) -> np.ndarray:
    """Training samples, test samples, and checksums of inputs, targets and column names."""
    digest = hashlib.sha256()
    for samples in (data.x_train, data.x_test):
        for block in blocks(samples):
            digest.update(block.contiguous().numpy().view(np.uint8).data)
    x = _number(digest)
    for targets in (data.y_train, data.y_test):
        digest.update(targets.contiguous().numpy().view(np.uint8).data)
    y = _number(digest)
    columns = source.columns.get(silo, ())
    names = zlib.crc32(repr(columns).encode()) if columns else 0
    found = np.array([len(data.x_train), len(data.x_test), x, y, names], dtype=np.float64)
    if silo in known and not np.array_equal(found, known[silo]):
        raise ConfigError(f"silo '{silo}': its data on this rank differ from those that it was trained on before")
    return found


def _number(digest: hashlib._Hash) -> int:
    return int.from_bytes(digest.digest()[:_BYTES])


def checksum(facts_F: np.ndarray) -> int:
    """What a checkpoint holds of a silo's facts."""
    return zlib.crc32(facts_F.tobytes())


def is_of(stored: int, facts_F: np.ndarray, data: SiloData) -> bool:
    """Whether the `checksum` in a checkpoint is of these data. One of fedmpi 0.2.0 has CRCs of inputs and targets."""
    if stored == checksum(facts_F):
        return True
    x, y, old_F = 0, 0, facts_F.copy()
    for samples, targets in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        for block in blocks(samples):
            x = zlib.crc32(block.contiguous().numpy().view(np.uint8).data, x)
        y = zlib.crc32(targets.contiguous().numpy().view(np.uint8).data, y)
    old_F[CHECKSUMS] = x, y
    return stored == checksum(old_F)


def same_columns(checksums_K: np.ndarray, source: Source, members: Membership, comm: Comm) -> None:
    """Raise ConfigError if files name different columns. As many columns of other meaning would still train, to a
    model that is wrong. The names that most silos have are taken as right."""
    named = [int(i) for i in np.flatnonzero(checksums_K)]
    if len(kinds := Counter(checksums_K[named].tolist())) < 2:
        return
    usual = max(kinds, key=lambda kind: kinds[kind])
    others = [i for i in named if checksums_K[i] != usual]
    first = next(i for i in named if checksums_K[i] == usual)

    def columns(silo: str) -> list[str]:
        mine = json.dumps(source.columns.get(silo, ()))
        return list(json.loads(comm.broadcast_text(mine, members.rank(silo))))

    ids = members.ids
    wanted = columns(ids[first])
    told = [_difference(ids[i], columns(ids[i]), ids[first], wanted) for i in others[:_SHOWN]]
    more = f"; and {len(others) - _SHOWN} more silos" if len(others) > _SHOWN else ""
    what = "rename them, or name those to use, in order, in data.features"
    raise agreed(ConfigError(f"{'; '.join(told)}{more}; {what}"))


def _difference(silo: str, columns: Sequence[str], other: str, wanted: Sequence[str]) -> str:
    """Text for an error: how the columns of two silos differ."""
    lacks, has = ([n for n in a if n not in b] for a, b in ((wanted, columns), (columns, wanted)))
    listed = [
        ", ".join(f"'{n}'" for n in some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "") for some in (has, lacks)
    ]
    return f"silo '{silo}' has {listed[0]} where silo '{other}' has {listed[1]}"
