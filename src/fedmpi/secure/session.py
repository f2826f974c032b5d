"""Masks between the silos of a running federation, whose vectors meet in collectives.

A collective delivers every rank's vector or fails, and before any vector is sent all ranks agree whose updates are in
the sum (rounds/agreement.py). So a silo masks only with silos that are in the sum, all masks cancel inside the
collective, and nothing is ever unmasked: no shares of secrets, no second message. This is protocol.py without the
phases that repair a sum whose summands may still be lost. If a rank dies, the round fails as a whole; what was sent
stays masked for ever, and the round is repeated with new keys.

    set-up     every silo has a key pair; public keys are gathered once per federation     (one small collective)
    a sum      one key per pair and sum, by HKDF from the pair's secret and a counter       (no message)

Two silos of one rank need no mask between them: it would cancel before anything leaves the rank. A silo has `degree`
neighbours (graph.py). A new federation (another membership, a resumed run, lost ranks) makes new keys. Keys are in the
memory of their rank only, in no checkpoint, log or record.

Small figures (losses, counts of samples, metrics) are summed under masks as well: each as a fixed-point number modulo
2^224. It is masked as a whole, and then cut into digits of 28 bits, which float64 sums exactly. So digits of the sum
say no more than the sum: their carries depend on the masks alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import ClassVar, NoReturn, Protocol

import numpy as np

from fedmpi.comm import Comm
from fedmpi.errors import ConfigError, ExchangeError, agreed
from fedmpi.secure.graph import connected, degree, neighbours
from fedmpi.secure.masks import PUBLIC_BYTES, KeyPair, Masks, derive, stream_into
from fedmpi.secure.noise import NoiseShares
from fedmpi.secure.numbers import POINT, fixed
from fedmpi.secure.ring import Ring

VECTOR, WEIGHT, FIGURES = "vector", "weight", "figures"  # what is summed

DIGIT, DIGITS = 28, 8  # bits of a digit, and number of digits
MODULUS = 40  # bits of the sum of how many ranks' figures are not finite
SPARE = 53 - MODULUS  # bits by which a sum may be larger than its summands
MOST_RANKS = 1 << SPARE  # whose figures add up exactly in float64
WIDTH = DIGITS + 1  # float64 per figure: the digits, and how many ranks' figures are not finite
_ALL = 1 << DIGIT * DIGITS  # the modulus of a figure
_LIMBS = DIGIT * DIGITS // 32  # words of 32 bits that mask a figure


class Masking(Protocol):
    """What a federation knows of its secure sums: a Session, or of silos in jobs of their own an Apart.

    Attributes: apart (whether silos are jobs of their own); ring (of the vectors); threshold (fewest silos in a sum);
    noise (that this rank's silos add to their words before masks, None: none).
    """

    apart: ClassVar[bool]
    ring: Ring
    threshold: int
    noise: NoiseShares | None

    def masks(self, what: str, silos: Collection[str], bits: int) -> Masks:
        """The masks of this rank's silos among `silos`, for the next sum of this kind."""
        ...

    def objection(self, silos: Sequence[str]) -> str:
        """Why the sum of these silos must not be revealed; empty if it may."""
        ...

    def alone(self) -> str:
        """What one of those who take part can compute of others at worst; empty if that is a sum of two or more."""
        ...

    def on(self, values: np.ndarray) -> np.ndarray:
        """See records.table.Cover, also for `off` and `width`."""
        ...

    def off(self, summed: np.ndarray) -> np.ndarray: ...

    def width(self, num: int) -> int: ...


class Session:
    """The keys of this rank's silos, as long as the federation lasts. Making one is collective.

    Attributes: ring (of the vectors); threshold (fewest silos in a sum); noise (that this rank's silos add to their
    words before masks, None: none).
    """

    apart: ClassVar[bool] = False
    noise: NoiseShares | None = None

    def __init__(
        self, comm: Comm, ids: Sequence[str], ranks: Sequence[int], ring: Ring, threshold: int, num: int | None = None
    ) -> None:
        """`ranks` are the silos' ranks; `num` neighbours of each silo, None: as graph.degree says. Raises ConfigError
        on every rank if a rank's silos could be cut off from the others'."""
        self.ring, self.threshold = ring, threshold
        self._index = {silo: i for i, silo in enumerate(ids)}
        self._ranks, self._num_ranks = list(ranks), comm.size
        self._counts: dict[str, int] = {}
        pairs = {i: KeyPair() for i, rank in enumerate(ranks) if rank == comm.rank}
        publics = _gathered(comm, self._ranks, pairs)
        self._near = neighbours(publics, min(degree(len(ids)) if num is None else num, len(ids) - 1))
        if comm.size > MOST_RANKS:
            raise agreed(ConfigError(f"secure: at most {MOST_RANKS} ranks, and there are {comm.size}"))
        if why := self.cut_off(ids):
            raise agreed(ConfigError(f"secure.neighbours: {why}; take more neighbours"))
        self._secrets = {  # of a silo here and a neighbour elsewhere
            (i, j): derive(pair.agree(publics[j]), "silos", min(i, j), max(i, j), num_bytes=32)
            for i, pair in pairs.items()
            for j in self._near[i]
            if self._ranks[j] != comm.rank
        }
        self._hosting = sorted({*ranks})

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys stay in memory")

    # ------------------------------------------------------------ vectors

    def masks(self, what: str, silos: Collection[str], bits: int) -> Masks:
        """The masks of this rank's silos among `silos`, for the next sum of this kind; WEIGHT for the weight beside the
        last vector. All ranks call this for the same sums in the same order."""
        return Masks(self._keys(what, silos), bits)

    def _keys(self, what: str, silos: Collection[str]) -> list[tuple[bytes, int]]:
        """The keys of `masks`, and whether they are added (1) or subtracted (-1)."""
        self._counts[what] = self._counts.get(what, 0) + 1
        number = self._counts[VECTOR if what == WEIGHT else what]
        there = {self._index[silo] for silo in silos}
        return [
            (derive(secret, what, number), 1 if i < j else -1)
            for (i, j), secret in self._secrets.items()
            if i in there and j in there
        ]

    def objection(self, silos: Sequence[str]) -> str:
        """Why the sum of these silos must not be revealed; empty if it may. The same on every rank."""
        if len(silos) < self.threshold:
            return f"{len(silos)} updates are usable, and secure.threshold is {self.threshold}: nothing was revealed"
        return self.cut_off(silos)

    def cut_off(self, silos: Collection[str]) -> str:
        """Whether masks leave out some ranks' silos, whose sum would then show, even to a rank that knows its own."""
        there = {self._index[silo] for silo in silos}
        edges: dict[int, set[int]] = {}
        for i in there:
            mine = edges.setdefault(self._ranks[i], set())
            mine |= {self._ranks[j] for j in self._near[i] if j in there}
        for seer in {None, *edges}:
            others = edges.keys() - {seer}
            if not connected(others, edges):
                return "the silos that remain are not connected by masks"
        return ""

    def alone(self) -> str:
        """What a rank can compute of others at worst, as text; empty if that is the sum of two silos or more."""
        return left_alone([self._ranks.count(rank) for rank in self._hosting], self.threshold)

    # ------------------------------------------------------------ figures

    def on(self, values: np.ndarray) -> np.ndarray:
        """This rank's figures under masks, [WIDTH * (n + 1)]; every rank's sum up to what `off` reads."""
        told = [fixed(value) for value in (*values.tolist(), 1.0)]
        missing = np.array([number is None for number in told], dtype=np.uint64)
        stream = np.empty((len(told), 5), dtype=np.uint64)  # a figure's limbs, a spare half word, that of `missing`
        limbs = np.zeros((len(told), _LIMBS), dtype=np.int64)
        for key, sign in self._keys(FIGURES, self._index):
            stream_into(key, stream.reshape(-1))
            limbs += sign * stream.view("<u4")[:, :_LIMBS].astype(np.int64)
            missing += stream[:, 4] if sign > 0 else -stream[:, 4]
        masks = [sum(limb << 32 * i for i, limb in enumerate(row)) for row in limbs.tolist()]
        rows = [_digits((number or 0) + mask) for number, mask in zip(told, masks, strict=True)]
        missing &= np.uint64((1 << MODULUS) - 1)
        return np.column_stack([np.array(rows, dtype=np.float64), missing.astype(np.float64)]).reshape(-1)

    def width(self, num: int) -> int:
        """Numbers that `on` gives for so many figures."""
        return num_covered(num)

    def off(self, summed: np.ndarray) -> np.ndarray:
        """The sums of the figures, [n]; nan where a rank's was not finite. Raises ExchangeError on every rank if masks
        do not cancel."""
        found = [_number(row) for row in summed.reshape(-1, WIDTH).tolist()]
        if found[-1] != self._num_ranks:
            raise agreed(ExchangeError(BROKEN))
        return np.array(found[:-1])


def left_alone(hosted: Sequence[int], threshold: int) -> str:
    """What a rank can compute of others at worst, as text; empty if that is the sum of two silos or more. `hosted`: the
    number of silos on each rank.

    >>> left_alone([1, 1, 1], 3), left_alone([1, 1, 1], 2)[:27]
    ('', 'whoever hosts 1 of the 2 si')
    """
    hosted = [num for num in hosted if num]
    if len(hosted) < 2:
        return "one process hosts all silos, so it sees every update" if sum(hosted) > 1 else ""
    most = max(hosted)
    if threshold - most > 1:
        return ""
    return (
        f"whoever hosts {most} of the {threshold} silos that a sum needs can subtract them and see the rest, "
        f"which may be one silo; take secure.threshold: {most + 2} or more, or more silos"
    )


BROKEN = "secure: the masks of this sum do not cancel, so ranks disagree about who is in it; the round is given up"


def num_covered(num: int) -> int:
    """Numbers that cross ranks for so many figures under masks."""
    return WIDTH * (num + 1)


def _gathered(comm: Comm, ranks: Sequence[int], pairs: dict[int, KeyPair]) -> list[bytes]:
    """All silos' public keys. Collective."""
    most = max(ranks.count(rank) for rank in {*ranks})
    mine = b"".join(pair.public for _, pair in sorted(pairs.items()))
    rows = comm.gather(mine.ljust(most * PUBLIC_BYTES, b"\0"))
    taken = [0] * comm.size
    publics = []
    for rank in ranks:
        publics.append(rows[rank][taken[rank] * PUBLIC_BYTES :][:PUBLIC_BYTES])
        taken[rank] += 1
    return publics


def _digits(number: int) -> list[int]:
    """The digits of a number modulo 2^224, the lowest first.

    >>> [_number([*_digits(fixed(value) or 0), 0]) for value in (-0.1, 3.4e38)]
    [-0.1, 3.4e+38]
    """
    number %= _ALL
    return [number >> DIGIT * i & (1 << DIGIT) - 1 for i in range(DIGITS)]


def _number(row: Sequence[float]) -> float:
    """The sum of some ranks' figures, from the sums of their digits and of what says how many are missing."""
    *digits, missing = (int(summed) for summed in row)
    if missing % (1 << MODULUS):
        return math.nan
    number = sum(digit << DIGIT * i for i, digit in enumerate(digits)) % _ALL
    return (number - _ALL * (number >= _ALL // 2)) / (1 << POINT)
