"""Transforms of updates between the local rule and the exchange, and of the mean before the server steps.

    updates: [{name: clip, norm: 1.0}, {name: noise, sigma: 0.1}]

Transforms run in that order, each on the result of the one before:

    on_silo(update, state, about)   changes a silo's update in place; False rejects it, and the record names it
    on_mean(mean_S, start, ...)     changes any slice of the mean delta, before the server optimizer
    follow(norms_N, state)          the new state after a round, from norms that every rank has

By default all three do nothing. State is arrays by name, equal on all ranks, saved in checkpoints. `checks` always runs
first, and again last if there are other transforms, so that sent updates are finite and fit. A rank folds its silos
before it learns about other ranks' silos, so figures of the whole cohort (a quantile, a median) are from earlier
rounds.

N updates that reach a transform, S elements of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import pydantic
import torch

from fedmpi import rng
from fedmpi.aggregate.centres import next_bound
from fedmpi.components import Family, NonNegativeFloat, PositiveFloat, called, component
from fedmpi.layout import DELTA, Layout, within
from fedmpi.server import FedDyn, OnMean
from fedmpi.types import Contribution

if TYPE_CHECKING:
    from fedmpi.config import Config

State = Mapping[str, np.ndarray]
Table = Callable[[str], np.ndarray]  # a column by name

BLOCK = 1 << 16  # elements of noise per key, independent of slices


class About(NamedTuple):
    """What a transform may know besides the update."""

    seed: int
    round: int
    layout: Layout  # of the update
    largest: float = math.inf  # updates with a larger norm are rejected
    number: int = 0  # index of the transform in the list
    bound: float = math.inf  # upper bound of the norm of incoming deltas, from the transforms before


class Transform:
    """Base class of transforms. Keeps no state and does nothing."""

    reads: ClassVar[frozenset[str]] = frozenset()  # per-silo figures that it reads: "norm" of incoming deltas, "share"
    changes: ClassVar[bool] = False  # whether it changes updates or means

    def init(self) -> State:
        """The state before the first round."""
        return {}

    def bound(self, state: State, before: float) -> float:
        """Upper bound of the norm of deltas that leave it, if `before` bounds those that come in."""
        return before

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        """Change the update in place. False rejects it."""
        return True

    def on_mean(self, mean_S: torch.Tensor, start: int, share: float, state: State, about: About) -> None:
        """Change the elements of the mean from `start` on in place; the result must not depend on the slices. `share`
        is the largest share of a silo in the mean."""

    def follow(self, norms_N: np.ndarray, state: State) -> State:
        """The state after a round, from the norms of incoming deltas [N], also of those rejected later."""
        return state

    def conflicts(self, config: Config) -> str | None:
        """Why the transform cannot work with the rest of the configuration; None if it can."""
        if self.changes and isinstance(config.server.optimizer, FedDyn):
            return f"updates: {called(self)} changes deltas, but feddyn's server adds up the changes of the silos' h"
        return None


def norm_of(vector: torch.Tensor) -> float:
    """The Euclidean norm."""
    return float(torch.linalg.vector_norm(vector))


@component
class Checks(Transform):
    """Rejects updates that are not finite or have a norm beyond 2^18 (less if the integer ring has less room). Always
    runs first."""

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        if update.untaken:  # nobody has read the delta, whose norm is known, and nothing travels besides
            return math.isfinite(update.weight) and update.norm < about.largest
        others_A = update.vector_Q[about.layout.num_params :]
        update.norm = norm_of(update[DELTA])
        norms = [update.norm, *([norm_of(others_A)] if len(others_A) else [])]
        return math.isfinite(update.weight) and all(norm < about.largest for norm in norms)  # False for nan


@component
class Clip(Transform):
    """Clips the norm of deltas to C: delta min(1, C / |delta|).

    C is fixed, or follows a quantile of the norms (Andrew et al. 2021, Differentially Private Learning with Adaptive
    Clipping, Algorithm 1): after a round C becomes C exp(-lr (b - quantile)), where b is the share of updates with a
    norm up to C. Deviation: no noise is added to b, so an adaptive C is not private.

    The whole delta is clipped, including averaged statistics. Auxiliary vectors (a control variate) are clipped only if
    `vectors` names them, each to the same C.

    >>> update = Contribution("a", 1, 1.0, torch.tensor([3.0, 4.0]), 0.0, 1, 1)
    >>> Clip(norm=1.0).on_silo(update, {}, About(0, 1, Layout.whole(2), math.inf)), update.vector_Q
    (True, tensor([0.6000, 0.8000]))
    """

    changes: ClassVar[bool] = True

    norm: PositiveFloat
    """C; with a quantile, C of the first round"""
    quantile: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    """quantile of the norms that C follows; null: C is fixed"""
    lr: PositiveFloat = 0.2
    """step size of log C, with a quantile"""
    vectors: tuple[str, ...] = (DELTA,)
    """vectors to clip, each separately"""

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.quantile is None else frozenset({"norm"})

    def init(self) -> State:
        """C, if it is adaptive."""
        return {} if self.quantile is None else {"norm": np.array([self.norm])}

    def _largest(self, state: State) -> float:
        return self.norm if self.quantile is None else float(state["norm"][0])

    def bound(self, state: State, before: float) -> float:
        return min(before, self._largest(state)) if DELTA in self.vectors else before

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        largest = self._largest(state)
        for name in self.vectors:
            if (norm := norm_of(update[name])) > largest:
                update[name].mul_(largest / norm)
        return True

    def follow(self, norms_N: np.ndarray, state: State) -> State:
        if self.quantile is None or not len(norms_N):
            return state
        return {"norm": np.array([next_bound(self._largest(state), norms_N, self.quantile, self.lr)])}

    def conflicts(self, config: Config) -> str | None:
        travel = [DELTA, *(auxiliary.name for auxiliary in config.local.auxiliaries)]
        if others := [name for name in self.vectors if name not in travel]:
            return f"updates: clip: no vector '{others[0]}' is sent; available: {', '.join(travel)}"
        return super().conflicts(config)


@component
class Noise(Transform):
    """Adds Gaussian noise, drawn for each round and silo, to every element of the delta except frozen parameters.

    NO CLAIM OF PRIVACY: no epsilon is computed, and anyone who knows the run's seed can remove the noise. Use it to
    study the effect of noise on a model, and `privacy` for a guarantee.

    With `where: mean` noise is added once, to the mean, in units of a silo's largest effect on it: the clip norm times
    the largest share of a silo in the mean (McMahan et al. 2018, Learning Differentially Private Recurrent Language
    Models, Algorithm 1, where the shares are equal).
    """

    changes: ClassVar[bool] = True

    sigma: NonNegativeFloat
    """standard deviation; after a clip, in units of the clip's norm"""
    where: Literal["silo", "mean"] = "silo"
    """silo: add to each silo's delta; mean: add once to the mean"""

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"share"}) if self.where == "mean" else frozenset()

    def bound(self, state: State, before: float) -> float:
        return math.inf if self.where == "silo" else before

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        if self.where == "silo":
            self._add(update[DELTA], 0, self._scale(about), about, update.silo)
        return True

    def on_mean(self, mean_S: torch.Tensor, start: int, share: float, state: State, about: About) -> None:
        if self.where == "mean":
            self._add(mean_S, start, self._scale(about) * (share if about.bound < math.inf else 1.0), about, "")

    def conflicts(self, config: Config) -> str | None:
        if self.where == "mean" and config.exchange.fragments > 1:
            return "updates: noise on the mean is scaled to one round of a silo, but a fragment holds several rounds"
        return super().conflicts(config)

    def _scale(self, about: About) -> float:
        return self.sigma * (about.bound if about.bound < math.inf else 1.0)

    def _add(self, vector_S: torch.Tensor, start: int, scale: float, about: About, silo: str) -> None:
        """Add noise to the elements from `start` on. Each block has its own generator, so slices do not matter."""
        stop = start + len(vector_S)
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
            purpose = f"noise {about.number}"
            draw = rng.generator(about.seed, purpose=purpose, round=about.round, silo=silo, epoch=block)
            noise_B = torch.from_numpy(draw.standard_normal(high - block * BLOCK))[low - block * BLOCK :].mul_(scale)
            for there in within(about.layout.still, low, high - low):
                noise_B[there] = 0.0
            vector_S[low - start : high - start].add_(noise_B.to(vector_S))


@component
class MaxNorm(Transform):
    """Rejects updates whose delta has a norm above a limit: a number, or a multiple of the last round's median norm,
    which counts rejected updates too.

    A rank folds its silos before it learns other ranks' norms, so the median cannot be the same round's. With `times`
    the first round rejects no update.
    """

    norm: PositiveFloat | None = None
    """largest norm"""
    times: PositiveFloat | None = None
    """or: largest norm as a multiple of the last round's median norm"""

    @pydantic.model_validator(mode="after")
    def _one(self) -> MaxNorm:
        if (self.norm is None) == (self.times is None):
            raise ValueError("give either 'norm' or 'times'")
        return self

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.times is None else frozenset({"norm"})

    def init(self) -> State:
        """An infinite median, with `times`."""
        return {} if self.times is None else {"median": np.array([math.inf])}

    def _largest(self, state: State) -> float:
        return self.norm if self.norm is not None else (self.times or 1.0) * float(state["median"][0])

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        return norm_of(update[DELTA]) <= self._largest(state)

    def follow(self, norms_N: np.ndarray, state: State) -> State:
        return state if self.times is None or not len(norms_N) else {"median": np.array([float(np.median(norms_N))])}


CHECKS = "checks"
TRANSFORMS = Family(
    "transform", {CHECKS: Checks, "clip": Clip, "noise": Noise, "max_norm": MaxNorm}, Transform, defaults=True
)


class Step(NamedTuple):
    """One transform of a round."""

    transform: Transform
    state: State
    about: About
    column: str  # column of the silos' table for incoming norms; empty: not needed


class Steps:
    """A round's transforms, in order."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def on_silo(
        self, update: Contribution, largest: float, before: float | None = None
    ) -> tuple[int, dict[str, float]]:
        """Run the transforms on an update. Returns the number, from 1, of the transform that rejects it (0: none), and
        the needed norms by column. Checks reject norms beyond `largest`; before other transforms, beyond `before` if it
        is given."""
        norms: dict[str, float] = {}
        for number, step in enumerate(self.steps, start=1):
            if step.column:
                norms[step.column] = norm_of(update[DELTA])
            most = largest if before is None or number == len(self.steps) else before
            if not step.transform.on_silo(update, step.state, step.about._replace(largest=most)):
                return number, norms
        return 0, norms

    def on_mean(self, share: float) -> OnMean | None:
        """A function that changes slices of the mean, in which no silo has a larger share than `share`; None if no
        transform does."""
        acting = [step for step in self.steps if type(step.transform).on_mean is not Transform.on_mean]

        def change(mean_S: torch.Tensor, start: int) -> None:
            for transform, state, about, _ in acting:
                transform.on_mean(mean_S, start, share, state, about)

        return change if acting else None


class Updates:
    """The transforms of a run, checks included. Their state is one dict, with `NUMBER/` before every name."""

    def __init__(self, transforms: Sequence[Transform] = ()) -> None:
        self.transforms = (Checks(), *transforms, *([Checks()] if transforms else []))
        self.names = [TRANSFORMS.name_of(transform) for transform in self.transforms]
        self.columns = [f"norm_{i}" if "norm" in t.reads else "" for i, t in enumerate(self.transforms)]

    @property
    def told(self) -> tuple[str, ...]:
        """Columns of the silos' table for incoming norms."""
        return tuple(column for column in self.columns if column)

    def init(self) -> dict[str, np.ndarray]:
        """The state before the first round."""
        return self._joined([transform.init() for transform in self.transforms])

    def steps(self, kept: State, seed: int, round: int, layout: Layout) -> Steps:
        """The transforms with their state, for one round."""
        found, bound = [], math.inf
        for number, (transform, state) in enumerate(zip(self.transforms, self._apart(kept), strict=True)):
            about = About(seed, round, layout, number=number, bound=bound)
            found.append(Step(transform, state, about, self.columns[number]))
            bound = transform.bound(state, bound)
        return Steps(found)

    def follow(self, kept: State, table: Table) -> State:
        """The state after a round. The silos' table has norms, `taken`, and in `rejected` the number, from 1, of the
        transform that rejected the update."""
        states = list(self._apart(kept))
        for number, (transform, column) in enumerate(zip(self.transforms, self.columns, strict=True)):
            if column:
                came = (table("taken") > 0) | (table("rejected") > number)
                states[number] = transform.follow(table(column)[came], states[number])
        return self._joined(states)

    @property
    def by_checks(self) -> int:
        """The number of the last checks, from 1."""
        return len(self.transforms)

    def _apart(self, kept: State) -> list[State]:
        numbers = range(len(self.transforms))
        return [{n.partition("/")[2]: v for n, v in kept.items() if n.partition("/")[0] == str(i)} for i in numbers]

    @staticmethod
    def _joined(states: Sequence[State]) -> dict[str, np.ndarray]:
        return {f"{i}/{name}": value for i, state in enumerate(states) for name, value in state.items()}
