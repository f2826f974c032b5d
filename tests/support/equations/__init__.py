"""Every algorithm against a plain numpy version of its paper, in float64, on a problem with unequal silos.

A module of this package has CASES: name -> Case, a configuration and a function that returns the expected parameters of
every round. test_equations.py runs them in this process, programs/equations.py on several ranks.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import fedmpi
from fedmpi.components import build, hints
from fedmpi.local import RULES, LocalSilo
from fedmpi.types import Silo, SiloData, Source

SIZES = (12, 30, 18, 7, 25)  # training samples
INPUTS = 3
ROUNDS = 5
BATCH = 5
IDS = tuple("abcde")


@dataclass(frozen=True)
class Quadratics:
    """Least squares, each silo with its own inputs and optimum; float64."""

    def source(self, seed: int) -> Source:
        silos = tuple(Silo(name, size) for name, size in zip(IDS, SIZES, strict=True))
        return Source("regression", (INPUTS,), 1, silos, samples)


def samples(silo: str) -> SiloData:
    rng = np.random.default_rng(IDS.index(silo))
    size = SIZES[IDS.index(silo)]
    x = rng.normal(size=(size + 4, INPUTS)) * rng.uniform(0.5, 1.5, INPUTS)
    y = x @ rng.normal(size=INPUTS) + 0.3 * rng.normal() + 0.1 * rng.normal(size=size + 4)
    x_all, y_all = torch.from_numpy(x), torch.from_numpy(y)
    return SiloData(x_all[:size], y_all[:size], x_all[size:], y_all[size:])


def two_layers() -> torch.nn.Module:
    """Four tanh units between inputs and output: weights [4, INPUTS] and [4], then [1, 4] and [1]."""
    layers = [torch.nn.Linear(INPUTS, 4, dtype=torch.float64), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(4, 1, dtype=torch.float64))


@dataclass(frozen=True)
class OneByOne:
    """One silo per round, in turn."""

    def init(self, num_train: Sequence[int]) -> dict[str, np.ndarray]:
        return {"next": np.zeros(1, np.int64)}

    def select(
        self, ids: Sequence[str], state: dict[str, np.ndarray], outcome: Any, rng: Any
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        return [ids[int(state["next"][0]) % len(ids)]], {"next": state["next"] + 1}


def linear() -> torch.nn.Module:
    """Weights [1, INPUTS] and a bias: the reference's vector [INPUTS + 1]."""
    return torch.nn.Linear(INPUTS, 1, dtype=torch.float64)


@dataclass
class Problem:
    """What a reference version may use. Silos are numbers 0 to K - 1; batches come in the file's order, without end."""

    start_P: np.ndarray
    cohorts: Sequence[Sequence[int]]  # of every round
    records: Sequence[dict[str, Any]]
    start_own: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the parts of the model that are not shared
    n: np.ndarray = field(default_factory=lambda: np.array(SIZES, float))

    def __post_init__(self) -> None:
        self._x, self._y = zip(*((d.x_train.numpy(), d.y_train.numpy()) for d in map(samples, IDS)), strict=True)
        self._cursor = [0] * len(IDS)

    @property
    def num_silos(self) -> int:
        return len(IDS)

    def shares(self, cohort: Sequence[int]) -> np.ndarray:
        """n_k over the cohort's samples."""
        return self.n[list(cohort)] / self.n[list(cohort)].sum()

    def gradient(self, w_P: np.ndarray, batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Gradient of the mean squared error."""
        x, y = batch
        error = x @ w_P[:-1] + w_P[-1] - y
        return 2 * np.append(x.T @ error, error.sum()) / len(x)

    def loss(self, w_P: np.ndarray, k: int) -> float:
        """The loss on all training samples of a silo."""
        return float(np.mean((self._x[k] @ w_P[:-1] + w_P[-1] - self._y[k]) ** 2))

    def whole(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """All training samples of a silo."""
        return self._x[k], self._y[k]

    def steps(self, k: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The next `number` batches of a silo; the last one of an epoch may be short."""
        return list(itertools.islice(self._batches(k), number))

    def epochs(self, k: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The batches of `number` passes over a silo."""
        end = self._cursor[k] + number * SIZES[k]
        found = []
        for batch in self._batches(k):
            found.append(batch)
            if self._cursor[k] >= end:
                return found
        raise AssertionError

    def _batches(self, k: int) -> Any:
        while True:
            at = self._cursor[k] % SIZES[k]
            stop = min(at + BATCH, SIZES[k])
            self._cursor[k] += stop - at
            yield self._x[k][at:stop], self._y[k][at:stop]


@dataclass(frozen=True)
class Case:
    """A configuration, and a function from the problem to the expected parameters after every round.

    With `own`, which finds a silo's own model or layers (None: none yet), the function returns (parameters, own) for
    every round, `own` by the silo's number.
    """

    config: dict[str, Any]
    wanted: Callable[[Problem], list[Any]]
    tolerance: float = 1e-10
    read: str = "parameters"  # attribute of the run to compare
    own: Callable[[Any, LocalSilo, torch.Tensor], torch.Tensor | None] | None = None


def own_model(rule: Any, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
    """The parameters that the silo would use, according to the rule."""
    return rule.personal(silo, params_P)


def own_layers(rule: Any, silo: LocalSilo, params_P: torch.Tensor) -> torch.Tensor | None:
    """The parts of the model that are not shared."""
    return silo.kept.get("fedmpi/personal_0")


HALF = {"name": "uniform", "fraction": 0.6}  # three of five


def trained(case: Case, out: str, comm: Any) -> tuple[list[np.ndarray], list[dict[int, np.ndarray]], Problem]:
    """The parameters after every round, this rank's silos' own parameters, and the problem for the reference."""
    values = {
        "rounds": ROUNDS,
        "out": out,
        "data": "support.equations:Quadratics",
        "model": "support.equations:linear",
        "device": {"name": "cpu"},
        "checkpoint": {"every": ROUNDS},
        **case.config,
    }
    usual = {"lr": 0.05, "batch_size": BATCH, "sampler": "in_order"}
    takes = hints(RULES.members[values["local"]["name"]])
    values["local"] = {**{name: value for name, value in usual.items() if name in takes}, **values["local"]}
    after, owned, records = [], [], []
    with fedmpi.Run(build(fedmpi.Config, values), comm=comm) as run:
        start_P, fed = run.parameters.numpy().copy(), run.federation
        start_own = fed.model.first_personal.get("fedmpi/personal_0", torch.zeros(0)).numpy().copy()
        for record in run:
            after.append(getattr(run, case.read).numpy().copy())
            found = {k: case.own(fed.rule, silo, run.parameters) for k, silo in fed.silos.items()} if case.own else {}
            owned.append({IDS.index(k): own.numpy().copy() for k, own in found.items() if own is not None})
            records.append(record)
    cohorts = [[IDS.index(silo) for silo in record["cohort"]] for record in records]
    return after, owned, Problem(start_P, cohorts, records, start_own)


def check(case: Case, out: str, comm: Any) -> list[list[float]]:
    """Raise AssertionError unless the run equals the reference; returns the parameters."""
    found, owned, problem = trained(case, out, comm)
    wanted = case.wanted(problem)
    if case.own is not None:
        wanted, wanted_own = zip(*wanted, strict=True)
        assert comm.size > 1 or owned[-1], "nobody has anything of its own"
        for number, (ours, theirs) in enumerate(zip(owned, wanted_own, strict=True), start=1):
            assert ours.keys() <= theirs.keys() and (comm.size > 1 or len(ours) == len(theirs))
            for k, own in ours.items():
                worst = float(np.abs(own - theirs[k]).max())
                assert worst < case.tolerance, f"round {number}, own model of silo {IDS[k]}: {worst}"
    assert len(found) == len(wanted) == ROUNDS
    assert np.abs(wanted[-1] - problem.start_P).max() > 1e-3, "nothing has moved"
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True), start=1):
        worst = float(np.abs(ours - theirs).max())
        assert worst < case.tolerance, f"round {number}: {worst}"
    return [w.tolist() for w in found]
