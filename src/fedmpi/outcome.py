"""RoundOutcome: a round's results as arrays over silos, equal on every rank.

Selectors and the divergence check read it, and the record is made from it. It can be restored, bit for bit, from the
record that a checkpoint stores, so a resumed run makes the same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# What became of a silo that still trained when its round closed, by number; 0: it was on time.
LATE = ("", "partial", "dropped", "buffered", "void")
PARTIAL, DROPPED, BUFFERED, VOID = range(1, 5)


@dataclass(frozen=True)
class RoundOutcome:
    """A round's outcome. Arrays are [K], in the order of `ids`; nan for a silo without a finite value."""

    round: int
    ids: Sequence[str]
    cohort_K: np.ndarray  # bool: selected
    rejected_K: np.ndarray | None  # bool: update rejected (not finite, or by a transform); None: not disclosed
    loss_K: np.ndarray  # mean training loss
    norm_K: np.ndarray  # Euclidean norm of the delta
    samples_K: np.ndarray  # samples visited in training, counted at each visit
    steps_K: np.ndarray  # optimizer steps
    loss: float | None = None  # training loss over the accepted updates; None if none is finite
    norm: float | None = None  # mean norm of their deltas
    not_finite: Sequence[str] = ()  # silos with a loss that is not finite, if disclosed
    num_rejected: int = 0
    num_not_finite: int = 0
    late_K: np.ndarray | None = None  # int: number in LATE; None: the policy waits for every silo
    deadline_s: float | None = None  # of the round; None: it had none
    repeats: int = 0  # times the round was trained again
    given_up: str = ""  # why the round changes nothing: its secure sum was not revealed; empty: it does
    # By silo: the record's rows, with test figures.
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)  # what the engine adds to the record
    # Inner products of the accepted deltas, for measurements only; not in checkpoints.
    gram_KK: np.ndarray | None = None

    @property
    def taken_K(self) -> np.ndarray:
        """bool [K]: update accepted. Raises LookupError under `disclose: pooled`."""
        if self.rejected_K is None:
            raise LookupError("whose updates were taken is not disclosed (disclose: pooled)")
        taken_K: np.ndarray = self.cohort_K & ~self.rejected_K & ~self.absent_K
        return taken_K

    @property
    def absent_K(self) -> np.ndarray:
        """bool [K]: late, and contributes nothing of this round."""
        none_K: np.ndarray = np.zeros(len(self.ids), dtype=bool)
        return none_K if self.late_K is None else self.late_K > PARTIAL

    @property
    def is_void(self) -> bool:
        """Whether the round was broken off because too few silos were through at the deadline."""
        return self.late_K is not None and bool((self.late_K == VOID).any())

    @property
    def late(self) -> dict[str, str]:
        """What became of each late silo."""
        numbers = [] if self.late_K is None else self.late_K.tolist()
        return {silo: LATE[int(number)] for silo, number in zip(self.ids, numbers, strict=False) if number}

    @property
    def num_taken(self) -> int:
        """Number of accepted updates."""
        return int(self.cohort_K.sum()) - self.num_rejected - int(self.absent_K.sum())

    @property
    def cohort(self) -> list[str]:
        """The silos of the cohort."""
        return self.names(self.cohort_K)

    @property
    def rejected(self) -> list[str]:
        """The silos whose updates were rejected; empty if not disclosed."""
        return [] if self.rejected_K is None else self.names(self.rejected_K)

    def metric(self, name: str) -> np.ndarray:
        """A test figure of each silo, [K]; all nan if the round was not evaluated."""
        return column(self.ids, self.rows, name)

    def names(self, mask_K: np.ndarray) -> list[str]:
        """The silos whose mask entry is True."""
        return [self.ids[i] for i in np.flatnonzero(mask_K).tolist()]

    def only(self, indices: np.ndarray) -> RoundOutcome:
        """The outcome restricted to some silos, by index; figures over all silos stay."""
        arrays = {name: array[indices] for name in _ARRAYS if (array := getattr(self, name)) is not None}
        return replace(self, ids=[self.ids[i] for i in indices.tolist()], **arrays)

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        round: int,
        cohort: Sequence[str] = (),
        rejected: Sequence[str] | None = (),
        rows: Mapping[str, Mapping[str, Any]] | None = None,
        **of_all: Any,
    ) -> RoundOutcome:
        """An outcome from rows by silo, with the names that records use."""
        rows = rows or {}
        by_silo: dict[str, Any] = {name: column(ids, rows, key) for name, key in _OF_SILO.items()}
        if rejected is not None:
            of_all = {"num_rejected": len(rejected)} | of_all
        cohort_K, rejected_K = members(ids, cohort), None if rejected is None else members(ids, rejected)
        return cls(round, ids, cohort_K, rejected_K, **by_silo, rows=rows, **of_all)

    @classmethod
    def from_record(cls, ids: Sequence[str], record: Mapping[str, Any]) -> RoundOutcome:
        """The outcome that a stored record was made from."""
        of_all: dict[str, Any] = {"loss": record["train_loss"], "norm": record["delta_norm"]}
        named = (record["round"], record["cohort"], record.get("rejected"), record["silos"])
        if (late := record.get("late")) is not None:
            of_all["late_K"] = np.array([LATE.index(late.get(silo, "")) for silo in ids])
            of_all |= {"deadline_s": record["deadline_s"], "repeats": record.get("repeats", 0)}
        if (why := record.get("given_up")) is not None:
            of_all["given_up"] = why
        if "num_rejected" in record:
            of_all["num_rejected"] = record["num_rejected"]
        not_finite = record.get("not_finite", ())
        number = record.get("num_not_finite", len(not_finite))
        return cls.of(ids, *named, **of_all, not_finite=not_finite, num_not_finite=number)


# Names of these figures in a record's rows.
_OF_SILO = {"loss_K": "train_loss", "norm_K": "delta_norm", "samples_K": "num_samples", "steps_K": "num_steps"}
_ARRAYS = ("cohort_K", "rejected_K", "late_K", *_OF_SILO)


def members(ids: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Mask of the silos that are in `names`, bool [K].

    >>> members(["a", "b"], ["b"])
    array([False,  True])
    """
    some = set(names)
    return np.array([silo in some for silo in ids], dtype=bool)


def column(ids: Sequence[str], rows: Mapping[str, Mapping[str, Any]], key: str) -> np.ndarray:
    """A figure of each silo, [K]; nan for a silo without it.

    >>> column(["a", "b", "c"], {"a": {"loss": 1.5}, "b": {"loss": None}}, "loss")
    array([1.5, nan, nan])
    """
    values = (rows.get(silo, {}).get(key) for silo in ids)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
