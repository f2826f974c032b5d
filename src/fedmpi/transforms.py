"""What happens to an update between the local rule and the exchange, and to the mean before the server steps.

    updates: [{name: clip, norm: 1.0}, {name: noise, sigma: 0.1}]

Transforms act in that order, each on what the one before it left:

    on_silo(update, state, about)   on a silo's update, in its memory; False rejects it, by name in the record
    on_mean(mean_S, start, ...)     on any slice of the mean delta, before the server's optimizer sees it
    follow(norms_N, state)          its state after a round, from norms that every rank has

All three do nothing unless a transform says otherwise. State is arrays by name, alike on all ranks, and part of
checkpoints. `checks` is always the first one, and the last one again where there are others: what is sent is finite and
has room. A rank folds its silos one after the other and hears of the others' only afterwards, so what depends on the
whole cohort (a quantile, a median) is taken from the rounds before.

N silos whose updates came in, S elements of a slice.
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

BLOCK = 1 << 16  # elements of noise with one key, wherever slices begin and end


class About(NamedTuple):
    """What a transform may know besides the update."""

    seed: int
    round: int
    layout: Layout  # of the update
    largest: float = math.inf  # norm beyond which an update is absurd
    number: int = 0  # which of the transforms it is
    bound: float = math.inf  # no delta that comes in has a larger norm, the transforms before it have seen to that


class Transform:
    """The base of all transforms: nothing is kept, nothing is done."""

    reads: ClassVar[frozenset[str]] = frozenset()  # figures of single silos: "norm" of each delta that came in, "share"
    changes: ClassVar[bool] = False  # are updates or means other than before?

    def init(self) -> State:
        """The state before the first round."""
        return {}

    def bound(self, state: State, before: float) -> float:
        """No delta that it lets through has a larger norm, where none that came in had one larger than `before`."""
        return before

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        """Change the update in its memory. False: it is rejected."""
        return True

    def on_mean(self, mean_S: torch.Tensor, start: int, share: float, state: State, about: About) -> None:
        """Change elements of the mean from `start` on, in their memory; the same whatever the slices are. `share` is
        the largest that a silo has in it."""

    def follow(self, norms_N: np.ndarray, state: State) -> State:
        """The state after a round, given the norms of the deltas that came in, rejected ones too unless not finite."""
        return state

    def conflicts(self, config: Config) -> str | None:
        """Why the transform does not go with the rest of a configuration; None where it does."""
        if self.changes and isinstance(config.server.optimizer, FedDyn):
            return f"updates: {called(self)} changes deltas, and feddyn's server adds up what the silos' own h moved by"
        return None


def norm_of(vector: torch.Tensor) -> float:
    """Its length."""
    return float(torch.linalg.vector_norm(vector))


@component
class Checks(Transform):
    """Rejects updates that are not finite, or absurd: a norm beyond 2^18 (in sums of integers, beyond their room). It
    is always the first one."""

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        others_A = update.vector_Q[about.layout.num_params :]
        update.norm = norm_of(update[DELTA])
        norms = [update.norm, *([norm_of(others_A)] if len(others_A) else [])]
        return math.isfinite(update.weight) and all(norm < about.largest for norm in norms)  # not so for nan


@component
class Clip(Transform):
    """Scales a longer delta down to a norm C: delta min(1, C / |delta|).

    C is set, or follows a quantile of the norms (Andrew et al. 2021, Differentially Private Learning with Adaptive
    Clipping, Algorithm 1): after a round C becomes C exp(-lr (b - quantile)), b being the share of the updates that
    were no longer than C. Deviation: b gets no noise, so nothing private may be read into C.

    The whole delta is clipped, averaged statistics in it; what a rule sends besides (a control variate) is not, unless
    `vectors` names it, and then has the same C for itself.

    >>> update = Contribution("a", 1, 1.0, torch.tensor([3.0, 4.0]), 0.0, 1, 1)
    >>> Clip(norm=1.0).on_silo(update, {}, About(0, 1, Layout.whole(2), math.inf)), update.vector_Q
    (True, tensor([0.6000, 0.8000]))
    """

    changes: ClassVar[bool] = True

    norm: PositiveFloat
    """C; where a quantile is given, in the first round"""
    quantile: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    """of the norms, which C follows; null: C stays"""
    lr: PositiveFloat = 0.2
    """of the steps in log C, with a quantile"""
    vectors: tuple[str, ...] = (DELTA,)
    """what is clipped, each by itself"""

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.quantile is None else frozenset({"norm"})

    def init(self) -> State:
        """C, where it moves."""
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
            return f"updates: clip is to clip '{others[0]}', and what travels is {', '.join(travel)}"
        return super().conflicts(config)


@component
class Noise(Transform):
    """Adds Gaussian noise, drawn anew for every round and silo, to every element of the delta but frozen parameters.

    THERE IS NO ACCOUNTANT YET, AND NO CLAIM OF PRIVACY: no epsilon is computed, and whoever knows the run's seed can
    take the noise off again. It is for studies of what noise does to a model.

    With `where: mean` it is added once, to the mean, with what a silo can at most move there as its unit: the norm
    times the largest share that a silo has in the mean (McMahan et al. 2018, Learning Differentially Private Recurrent
    Language Models, Algorithm 1, where the shares are equal).
    """

    changes: ClassVar[bool] = True

    sigma: NonNegativeFloat
    """standard deviation; where a clip comes before it, in units of the clip's norm"""
    where: Literal["silo", "mean"] = "silo"
    """to each silo's delta, or once to the mean"""

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
            return "updates: noise on the mean goes by what a silo moves in one round, and a fragment holds several"
        return super().conflicts(config)

    def _scale(self, about: About) -> float:
        return self.sigma * (about.bound if about.bound < math.inf else 1.0)

    def _add(self, vector_S: torch.Tensor, start: int, scale: float, about: About, silo: str) -> None:
        """Elements from `start` on; those of a block come from one generator, whole, so that slices do not matter."""
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
    """Rejects updates whose delta has a larger norm: than a number, or than so many times the median of the round
    before, in which rejected updates count too.

    A rank folds its silos before it hears of the others', so the median is not that of the same round; in the first
    round `times` rejects nobody.
    """

    norm: PositiveFloat | None = None
    """largest norm"""
    times: PositiveFloat | None = None
    """or: largest norm, in medians of the last round's norms"""

    @pydantic.model_validator(mode="after")
    def _one(self) -> MaxNorm:
        if (self.norm is None) == (self.times is None):
            raise ValueError("give either 'norm' or 'times'")
        return self

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.times is None else frozenset({"norm"})

    def init(self) -> State:
        """No median is known."""
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
    column: str  # of the silos' table, where the norms that come in are told; empty: they are not asked for


class Steps:
    """A round's transforms, one after the other."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def on_silo(self, update: Contribution, largest: float) -> tuple[int, dict[str, float]]:
        """The first one that says no, counted from 1 (0: nobody does), and the norms that are asked for, by column. A
        norm beyond `largest` is absurd."""
        norms: dict[str, float] = {}
        for number, step in enumerate(self.steps, start=1):
            if step.column:
                norms[step.column] = norm_of(update[DELTA])
            if not step.transform.on_silo(update, step.state, step.about._replace(largest=largest)):
                return number, norms
        return 0, norms

    def on_mean(self, share: float) -> OnMean | None:
        """What changes slices of a mean in which no silo has a larger share; None: nothing does."""
        acting = [step for step in self.steps if type(step.transform).on_mean is not Transform.on_mean]

        def change(mean_S: torch.Tensor, start: int) -> None:
            for transform, state, about, _ in acting:
                transform.on_mean(mean_S, start, share, state, about)

        return change if acting else None


class Updates:
    """The transforms of a run, the checks among them. Their state is one dict, with `NUMBER/` before every name."""

    def __init__(self, transforms: Sequence[Transform] = ()) -> None:
        self.transforms = (Checks(), *transforms, *([Checks()] if transforms else []))
        self.names = [TRANSFORMS.name_of(transform) for transform in self.transforms]
        self.columns = [f"norm_{i}" if "norm" in t.reads else "" for i, t in enumerate(self.transforms)]

    @property
    def told(self) -> tuple[str, ...]:
        """Columns of the silos' table for norms that come in."""
        return tuple(column for column in self.columns if column)

    def init(self) -> dict[str, np.ndarray]:
        """The state before the first round."""
        return self._joined([transform.init() for transform in self.transforms])

    def steps(self, kept: State, seed: int, round: int, layout: Layout) -> Steps:
        """What a round does."""
        found, bound = [], math.inf
        for number, (transform, state) in enumerate(zip(self.transforms, self._apart(kept), strict=True)):
            about = About(seed, round, layout, number=number, bound=bound)
            found.append(Step(transform, state, about, self.columns[number]))
            bound = transform.bound(state, bound)
        return Steps(found)

    def follow(self, kept: State, table: Table) -> State:
        """The state after a round whose table of silos has norms, `taken`, and in `rejected` who said no, counted from
        1."""
        states = list(self._apart(kept))
        for number, (transform, column) in enumerate(zip(self.transforms, self.columns, strict=True)):
            if column:
                came = (table("taken") > 0) | (table("rejected") > number)
                states[number] = transform.follow(table(column)[came], states[number])
        return self._joined(states)

    @property
    def by_checks(self) -> int:
        """The number of the last checks, counted from 1."""
        return len(self.transforms)

    def _apart(self, kept: State) -> list[State]:
        numbers = range(len(self.transforms))
        return [{n.partition("/")[2]: v for n, v in kept.items() if n.partition("/")[0] == str(i)} for i in numbers]

    @staticmethod
    def _joined(states: Sequence[State]) -> dict[str, np.ndarray]:
        return {f"{i}/{name}": value for i, state in enumerate(states) for name, value in state.items()}
