"""What a run spends, as state: counted before anything is released, on disk and in every rank's memory.

    OUT/privacy.json    {"delta", "uses": [{"sigma", "rate", "every", "segment", "silo", "discrete", "count"}]}

The file is written by rank 0 and flushed before the parameters of a round exist anywhere. A run that is killed and
repeats rounds draws new noise for them and counts them again. Nothing takes a count back: not a checkpoint, not a
recovery from lost ranks. Every round has a new secret, drawn by rank 0 from the operating system and sent to the other
ranks; it is never written.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedmpi import disk, rng
from fedmpi.comm import Comm
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.local.base import Guard
from fedmpi.output import at_most
from fedmpi.privacy.account import Use, Uses, largest_epsilon
from fedmpi.privacy.base import Privacy
from fedmpi.privacy.noise import secret_generator
from fedmpi.state import StateTensor

FILE = "privacy.json"
SLACK = 1 + 1e-9  # of the budget, for rounding


class Spending:
    """A run's account, and the secret of the current round. All its methods except properties are collective.

    Attributes: sigmas (noise multipliers, by silo whose records are protected, or by '' where silos are); expected
    (silos in a cohort on average); empty (whether the round drew no silo); secret (of the round); segment, step (secret
    of correlated noise, and rounds since it began); epsilon (spent so far).
    """

    def __init__(self, path: Path, delta: float, budget: float | None = None, seed: int | None = None) -> None:
        self.path, self.delta, self.budget = path, delta, budget
        self.sigmas: dict[str, float] = {}
        self.seed = seed  # of a run that repeats its noise; None: noise is secret
        self.uses: dict[Use, int] = {}
        self.expected = 1.0
        self.secret = self.segment = ""
        self.step = -1
        self.empty = False
        self.epsilon = 0.0  # spent so far
        self.of_silos = False  # whether whole silos are protected, not their records
        self.draws = False  # whether the cohort must be drawn in secret
        self.denominator = self.largest_weight = 1.0  # weight of an expected cohort, and at most of a silo
        # What a round spends, given the segment and its cohort; without a cohort, what it may spend.
        self.next: Callable[[str, Sequence[str] | None], Mapping[Use, int]] = lambda segment, cohort: {}
        self.guard: Callable[[str, int], Guard | None] = lambda silo, number: None  # of a silo in a round
        self._fresh = True
        self._measured: tuple[Uses, float] = {}, 0.0

    @classmethod
    def of(cls, section: Privacy, out: Path, seed: int) -> Spending:
        """The account of a run, before `open`."""
        return cls(out / FILE, section.delta, section.epsilon, seed if section.reproducible else None)

    @property
    def told(self) -> str:
        """What is spent, for messages."""
        of = "" if self.budget is None else f" of {self.budget:g}"
        return f"epsilon {at_most(self.epsilon)}{of} at delta {self.delta:g}"

    def total(self) -> int:
        """All uses so far."""
        return sum(self.uses.values())

    # ------------------------------------------------------------ rounds

    def open(self, comm: Comm) -> None:
        """Read what earlier starts of the run have spent."""
        text = comm.collectively(lambda: self._read() if comm.rank == 0 else "")
        self._take(comm.broadcast_text(text, 0))
        self._measure(comm)

    def begin(self, comm: Comm, number: int) -> bool:
        """Draw the secrets of a round. False if the budget does not suffice for it."""
        counts = comm.gather_number(self.total())
        if (counts != counts[0]).any():  # a fresh rank, or one that was lost while it told
            self._take(comm.broadcast_text(self._text(), int(np.argmax(counts))))
        if self._fresh or not self.segment:
            self.segment, self.step = "", -1
        told = json.loads(comm.broadcast_text(json.dumps(self._drawn(number) if comm.rank == 0 else None), 0))
        self.secret, self.segment, self.step = told
        self._fresh = False
        self.empty = False
        if self.budget is None:
            return True
        after = comm.collectively(lambda: self._after() if comm.rank == 0 else 0.0)
        return float(comm.gather_number(after)[0]) <= self.budget * SLACK

    def _drawn(self, number: int) -> tuple[str, str, int]:
        secret = secrets.token_hex(16)
        segment = self.segment or secrets.token_hex(16)
        if self.seed is not None:
            secret = f"{rng.key(self.seed, purpose='privacy', round=number):016x}"
            segment = self.segment or f"{rng.key(self.seed, purpose='privacy segment', round=number):016x}"
        return secret, segment, self.step + 1

    def _after(self) -> float:
        return self._epsilon(_sum(self.uses, self.next(self.public_segment, None)))

    def _epsilon(self, uses: Uses) -> float:
        if self._measured[0] != uses:
            self._measured = dict(uses), largest_epsilon(uses, self.delta)
        return self._measured[1]

    @property
    def public_segment(self) -> str:
        """A name of the segment that does not tell its secret."""
        return f"{secret_generator(self.segment, 'name').integers(1 << 62):016x}" if self.segment else ""

    def drew(self, selector: Mapping[str, np.ndarray]) -> None:
        """Note whether the selector, whose new state this is, drew nobody, so that a silo stands in."""
        self.empty = self.draws and bool(selector["empty"][0])

    def draw(self) -> np.random.Generator:
        """The generator of the round's secret cohort."""
        return secret_generator(self.secret, "select")

    def spend(self, comm: Comm, cohort: Sequence[str] | None = None) -> None:
        """Count a round, on disk and in memory, before anything of it is released. Raises CheckpointError on all ranks
        if it cannot be written."""
        self.uses = _sum(self.uses, self.next(self.public_segment, cohort))
        comm.collectively(self._write if comm.rank == 0 else lambda: None)
        self._measure(comm)

    def _measure(self, comm: Comm) -> None:
        spent = comm.collectively(lambda: self._epsilon(self.uses) if comm.rank == 0 else 0.0)
        self.epsilon = float(comm.gather_number(spent)[0])

    def renew(self) -> None:
        """Start a new segment of correlated noise with the next round: after a resume, a recovery, new members."""
        self._fresh = True

    # ------------------------------------------------------------ disk

    def _text(self) -> str:
        rows = [{**use._asdict(), "count": count} for use, count in self.uses.items()]
        return json.dumps({"delta": self.delta, "uses": rows}, indent=1)

    def _take(self, text: str) -> None:
        """Replace the account by a longer one."""
        try:
            rows = json.loads(text)["uses"] if text else []
            self.uses = {Use.of(row): int(row["count"]) for row in rows}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path} is damaged, so what the run has spent is not known") from None

    def _read(self) -> str:
        try:
            return disk.read_bytes(self.path).decode() if self.path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {self.path}: {error}") from None

    def _write(self) -> None:
        try:
            disk.replace_text(self.path, self._text())
        except OSError as error:
            raise CheckpointError(f"cannot write what the run spends into {self.path}: {error}") from None

    # ------------------------------------------------------------ checkpoints (state.Holder)

    def state(self) -> Iterator[StateTensor]:
        """The number of uses so far."""
        yield StateTensor(("count",), torch.tensor(self.total()))

    def restore(self, stored: Sequence[StateTensor]) -> None:
        """Check that the account has not lost anything since. Raises ConfigError if it has."""
        self.renew()
        for one in stored:
            if int(one.tensor) > self.total():
                raise ConfigError(
                    f"{self.path} counts {self.total()} uses and the checkpoint {int(one.tensor)}: what the run has "
                    "spent is not known; put the file back, or choose another out="
                )


def _sum(one: Uses, other: Uses) -> dict[Use, int]:
    return {use: one.get(use, 0) + other.get(use, 0) for use in (*one, *other)}
