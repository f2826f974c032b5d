"""Secure aggregation over messages that may be lost: Bonawitz et al. 2017, Practical Secure Aggregation for
Privacy-Preserving Machine Learning, figure 4, for an honest-but-curious server; with the graph of Bell et al. 2020.

    once for R rounds
      0 advertise    silo u -> server    public keys c_u, s_u for every round
      1 share        silo u -> server    for each neighbour, sealed: a share of s_u's private key and of b_u
    every round
      2 masked       silo u -> server    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(k_uv) - sum_{v < u} PRG(k_uv)
      3 unmask       server -> silo      who sent y (the survivors)
                     silo u -> server    shares of b_v for neighbours that survive, of s_v for those that do not

The server then adds the y_u of survivors, subtracts their self masks PRG(b_v), and the pairwise masks between survivors
and silos that are lost. A silo gives, for one other silo and round, either the share of b or that of s, never both, and
answers once a round. With fewer than `threshold` survivors, or answers, the server gets nothing and the round is void.

Every round has keys of its own, so what is opened in one says nothing about another. The set-up makes those of R rounds
at once, which leaves two messages per silo and round. All silos of a set-up take part in its rounds unless lost.

Small numbers (numbers.py) may be summed beside a vector, under masks of their own from the same keys. An answer is
sealed for the server by a key that it makes for the question. Seals are bound to `about`, what the sum is.

Both sides are state machines without I/O: each step takes what arrived and returns what is to be sent. Not covered: a
server that sends other keys to other silos (that takes signed keys), and one that tells silos different survivors.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedmpi.errors import FedmpiError
from fedmpi.secure import numbers as figures
from fedmpi.secure import shamir
from fedmpi.secure.graph import neighbours
from fedmpi.secure.masks import KeyPair, add_stream, derive, fresh_secret, seal, unseal

_PAIR, _SELF, _SHARES, _ANSWER = "pair", "self", "shares", "answer"  # labels of keys
_ROW = struct.Struct(f">I?{shamir.SHARE_BYTES}s")  # of an answer: silo, whether the share is of its b, the share


class GivenUp(FedmpiError):
    """Too few silos remain for the sum: nothing was revealed."""


class Advert(NamedTuple):
    """Phase 0 of a silo: public keys."""

    channel: bytes  # c, for sealed shares
    masks: Sequence[bytes]  # s, one for each round


class Answer(NamedTuple):
    """Phase 3 of a silo: shares by silo."""

    selves: Mapping[int, bytes]  # of b, for survivors
    keys: Mapping[int, bytes]  # of s, for those that are lost

    def packed(self) -> bytes:
        """As bytes."""
        told = [*((silo, True, share) for silo, share in self.selves.items())]
        told += [(silo, False, share) for silo, share in self.keys.items()]
        return b"".join(_ROW.pack(*row) for row in told)

    @classmethod
    def unpacked(cls, text: bytes) -> Answer:
        """The answer that `packed` has made these bytes of."""
        told: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        for silo, own, share in _ROW.iter_unpack(text):
            told[not own][silo] = share
        return cls(*told)


class Party:
    """One silo, known to all by its index."""

    def __init__(self, index: int, threshold: int, num_rounds: int = 1) -> None:
        _at_least_two(threshold)
        self.index, self._threshold = index, threshold
        self._channel = KeyPair()
        self._pairs = [KeyPair() for _ in range(num_rounds)]
        self._selves = [fresh_secret() for _ in range(num_rounds)]
        self._adverts: Mapping[int, Advert] = {}
        self._near: list[int] = []  # neighbours
        self._held: dict[int, bytes] = {}  # shares of my neighbours' secrets, by neighbour
        self._about = b""  # what seals are bound to, besides sender and receiver
        self._masked: set[int] = set()  # rounds
        self._answered: set[int] = set()

    def advertise(self) -> Advert:
        """Phase 0."""
        return Advert(self._channel.public, [pair.public for pair in self._pairs])

    def share(self, adverts: Mapping[int, Advert], num_neighbours: int, about: bytes = b"") -> dict[int, bytes]:
        """Phase 1, from all silos' public keys: a sealed message for each neighbour. Once. Raises GivenUp if too few
        silos are there."""
        if self._held:
            raise ValueError("shared already: other shares of the same secrets would open them")
        self._adverts, self._about = dict(adverts), about
        self._near = near(self._adverts, num_neighbours)[self.index]
        if len(self._near) + 1 < self._threshold:
            raise GivenUp(f"{len(adverts)} silos, and {self._threshold} are needed")
        points = [self.index + 1, *(other + 1 for other in self._near)]
        made = []
        for pair, own in zip(self._pairs, self._selves, strict=True):
            made.append(shamir.split(pair.private_bytes(), self._threshold, points))
            made.append(shamir.split(own, self._threshold, points))
        self._held[self.index] = b"".join(shares[self.index + 1] for shares in made)
        sealed = {}
        for other in self._near:
            text = b"".join(shares[other + 1] for shares in made)
            sealed[other] = seal(self._key_to(other), text, self._bound(self.index, other))
        return sealed

    def receive(self, sealed: Mapping[int, bytes]) -> None:
        """The neighbours' messages of phase 1. A silo whose message is missing counts as lost from the start. Raises
        ValueError for a message that was changed, and GivenUp if too few came."""
        for other in self._near:
            if other in sealed:
                text = unseal(self._key_from(other), sealed[other], self._bound(other, self.index))
                if len(text) != len(self._held[self.index]):
                    raise ValueError(f"{len(text)} bytes are no shares")
                self._held[other] = text
        if len(self._held) < self._threshold:
            raise GivenUp(f"{len(self._held)} silos shared their keys, and {self._threshold} are needed")

    def mask(self, round: int, words: np.ndarray, numbers: list[int] | None = None) -> None:
        """Phase 2, in place on unsigned integers, and on the numbers beside them. Once a round."""
        if round in self._masked:
            raise ValueError(f"round {round} is masked already: its keys serve once")
        self._masked.add(round)
        keys = [(derive(self._selves[round], _SELF, round), 1)]
        for other in self._near:
            if other in self._held:
                secret = self._pairs[round].agree(self._adverts[other].masks[round])
                keys.append((derive(secret, _PAIR, round), _sign(self.index, other)))
        for key, sign in keys:
            add_stream(key, sign, words)
            figures.add_masks(key, sign, [] if numbers is None else numbers)

    def answer(self, round: int, survivors: Collection[int]) -> Answer:
        """Phase 3. Once a round; raises GivenUp if too few survive, ValueError at a second question."""
        there = set(survivors)
        if round in self._answered or round not in self._masked:
            raise ValueError(f"round {round} was answered already, or never masked")
        if len(there & self._held.keys()) < self._threshold or self.index not in there:
            raise GivenUp(f"{len(there)} silos survive round {round}, and {self._threshold} are needed")
        self._answered.add(round)
        selves, keys = {}, {}
        for other, text in self._held.items():
            start = 2 * round * shamir.SHARE_BYTES
            key, own = (text[start + n * shamir.SHARE_BYTES :][: shamir.SHARE_BYTES] for n in (0, 1))
            if other in there:
                selves[other] = own
            else:
                keys[other] = key
        return Answer(selves, keys)

    def seal_answer(self, answer: Answer, public: bytes) -> bytes:
        """An answer for the server that asks under this public key."""
        key = derive(self._channel.agree(public), _ANSWER, self.index)
        return seal(key, answer.packed(), self._about + public)

    def _bound(self, sender: int, receiver: int) -> bytes:
        return self._about + f"{sender} to {receiver}".encode()

    def _key_to(self, other: int) -> bytes:
        return derive(self._channel.agree(self._adverts[other].channel), _SHARES, self.index, other)

    def _key_from(self, other: int) -> bytes:
        return derive(self._channel.agree(self._adverts[other].channel), _SHARES, other, self.index)


class Collector:
    """The server: passes messages on, sums, and removes masks."""

    def __init__(self, threshold: int, num_neighbours: int) -> None:
        _at_least_two(threshold)
        self._threshold, self._num_neighbours = threshold, num_neighbours
        self._adverts: dict[int, Advert] = {}
        self._near: dict[int, list[int]] = {}
        self._sharing: set[int] = set()
        self._question = KeyPair()

    @property
    def public(self) -> bytes:
        """The key under which this server asks for answers. Nobody else reads them, nor does a later server."""
        return self._question.public

    def gather(self, adverts: Mapping[int, Advert]) -> dict[int, Advert]:
        """Phase 0: all silos' public keys, for all silos. Raises GivenUp if there are too few."""
        self._require(adverts, "advertised keys")
        self._adverts = dict(adverts)
        self._near = near(self._adverts, self._num_neighbours)
        return self._adverts

    def route(self, sealed: Mapping[int, Mapping[int, bytes]]) -> dict[int, dict[int, bytes]]:
        """Phase 1: the messages by receiver, from those by sender. Raises GivenUp if too few came."""
        self._require(sealed, "shared their keys")
        self._sharing = set(sealed)
        found: dict[int, dict[int, bytes]] = {silo: {} for silo in sealed}
        for sender, letters in sealed.items():
            for receiver, letter in letters.items():
                if receiver in found:
                    found[receiver][sender] = letter
        return found

    def survivors(self, masked: Collection[int]) -> list[int]:
        """Phase 3: who is in the sum. Raises GivenUp if too few are."""
        self._require(masked, "sent a masked vector")
        return sorted(masked)

    def hear(self, silo: int, sealed: bytes, about: bytes = b"") -> Answer:
        """The answer that a silo has sealed for this server. Raises ValueError if it was changed, or is for another."""
        key = derive(self._question.agree(self._adverts[silo].channel), _ANSWER, silo)
        return Answer.unpacked(unseal(key, sealed, about + self.public))

    def unmask(self, round: int, masked: Mapping[int, np.ndarray], answers: Mapping[int, Answer]) -> np.ndarray:
        """The sum of the survivors' vectors, modulo 2^32 or 2^64. Raises GivenUp if shares are too few."""
        there = self.survivors(masked)
        keys = self.left(round, there, answers)
        total = np.zeros_like(masked[there[0]])
        for silo in there:
            total += masked[silo]
        for key, sign in keys:
            add_stream(key, -sign, total)
        return total

    def left(self, round: int, there: Collection[int], answers: Mapping[int, Answer]) -> list[tuple[bytes, int]]:
        """The keys of the masks that are left in the sum of the survivors, and with which sign. Raises GivenUp."""
        self._require(answers, "answered")
        selves: dict[int, dict[int, bytes]] = {}
        keys: dict[int, dict[int, bytes]] = {}
        for silo, answer in answers.items():
            for found, told in ((selves, answer.selves), (keys, answer.keys)):
                for other, share in told.items():
                    found.setdefault(other, {})[silo + 1] = share
        masks = [(derive(self._join(selves, silo), _SELF, round), 1) for silo in there]
        for lost in sorted(self._sharing - set(there)):
            beside = [silo for silo in self._near[lost] if silo in there]
            if not beside:
                continue
            pair = KeyPair(self._join(keys, lost))
            for silo in beside:
                key = derive(pair.agree(self._adverts[silo].masks[round]), _PAIR, round)
                masks.append((key, _sign(silo, lost)))
        return masks

    def _join(self, shares: Mapping[int, Mapping[int, bytes]], silo: int) -> bytes:
        try:
            return shamir.join(shares.get(silo, {}), self._threshold)
        except ValueError as error:
            raise GivenUp(f"silo {silo}: {error}") from None

    def _require(self, there: Collection[int], what: str) -> None:
        if len(there) < self._threshold:
            raise GivenUp(f"{len(there)} silos {what}, and {self._threshold} are needed")


def near(adverts: Mapping[int, Advert], num: int) -> dict[int, list[int]]:
    """The neighbours of each silo in the graph."""
    order = sorted(adverts)
    found = neighbours([adverts[silo].channel for silo in order], num)
    return {silo: [order[i] for i in some] for silo, some in zip(order, found, strict=True)}


def _sign(mine: int, other: int) -> int:
    """Of the mask that two silos share, in the vector of `mine`."""
    return 1 if mine < other else -1


def _at_least_two(threshold: int) -> None:
    if threshold < 2:
        raise ValueError(f"threshold {threshold}: the sum of one silo is its vector")
