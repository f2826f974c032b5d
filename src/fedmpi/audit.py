"""`fedmpi audit`: an empirical lower bound of epsilon, beside the account.

One run is audited with many canaries (Steinke, Nasr & Jagielski 2023, Privacy Auditing with One (1) Training Run): each
canary, a noisy sample with a random label, is in a silo's training data with probability 1/2. After training the
canaries whose loss fell most are guessed to have been in, those whose loss fell least to have been out. Under
(epsilon, delta)-DP the number of correct guesses is bounded (Theorem 5.2); a number beyond that refutes it.

Where whole silos are protected, the canaries are silos: each, if it is in, sends a vector of its own random direction
and of the clip's norm as its update, and counts as zero if it is out. Those along whose direction the parameters moved
most are guessed to have been in.

A small bound proves nothing: the attack sees the last parameters only. A bound above the account means a bug.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fedmpi import rng
from fedmpi.aggregate import Mean
from fedmpi.comm import SoloComm
from fedmpi.components import PositiveFloat, PositiveInt, component, did_you_mean
from fedmpi.config import Config
from fedmpi.data import DATASETS
from fedmpi.errors import ConfigError
from fedmpi.layout import DELTA
from fedmpi.local.base import Guard
from fedmpi.privacy import SiloPrivacy
from fedmpi.privacy.account import Use, epsilon
from fedmpi.privacy.per_sample import losses_of
from fedmpi.privacy.record import DpSgd
from fedmpi.privacy.spending import FILE
from fedmpi.train import Run
from fedmpi.transforms import About, State, Transform, Updates
from fedmpi.types import Contribution, Dataset, Silo, SiloData, Source, Streamed


@component
class Canaried:
    """A dataset with canaries in the training data of one silo, each with probability 1/2."""

    data: Annotated[Dataset, DATASETS]
    """the dataset"""
    silo: str
    """the silo that gets canaries"""
    count: PositiveInt
    """number of canaries"""
    scale: PositiveFloat = 1.0
    """standard deviation of a canary's values / that of the silo's"""
    all_rows: bool = False
    """keep the rows of canaries that are out, so that the number of rows is fixed; who trains leaves them out"""

    def source(self, seed: int) -> Source:
        """The dataset's, with the canaries that are in; the sizes of silos are then not declared."""
        inner = self.data.source(seed)
        if inner.task not in ("classification", "binary"):
            raise ConfigError(f"audit: canaries have random classes, and the data's task is {inner.task}")
        if self.silo not in (ids := [silo.id for silo in inner.silos]):
            raise ConfigError(f"audit: no silo '{self.silo}'{did_you_mean(self.silo, ids)}")

        def opened(name: str) -> SiloData:
            data = inner.open(name)
            if name != self.silo:
                return data
            x, y, inside = self.canaries(data, seed, inner.num_classes)
            kept = torch.ones_like(inside) if self.all_rows else inside
            assert isinstance(data.x_train, torch.Tensor)  # `canaries` refuses others
            x_train, y_train = torch.cat([data.x_train, x[kept]]), torch.cat([data.y_train, y[kept]])
            return SiloData(x_train, y_train, data.x_test, data.y_test)

        silos = tuple(replace(silo, num_samples=None) for silo in inner.silos)
        return replace(inner, silos=silos, open=opened)

    def canaries(self, data: SiloData, seed: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples, labels, and whether each is in. Raises ConfigError if the silo's inputs are no real numbers."""
        if isinstance(data.x_train, Streamed):
            raise ConfigError("audit: it adds canaries to the samples in memory; data.stream: false")
        if not data.x_train.is_floating_point():
            raise ConfigError(f"audit: canaries are noise, and the inputs of silo '{self.silo}' are integers")
        draw = rng.generator(seed, purpose="canaries", silo=self.silo)
        shape, spread = (self.count, *data.x_train.shape[1:]), self.scale * float(data.x_train.std())
        x = torch.from_numpy(draw.standard_normal(shape)).mul_(spread).add_(float(data.x_train.mean()))
        y = torch.from_numpy(draw.integers(max(num_classes, 2), size=self.count))
        inside = torch.from_numpy(draw.random(self.count) < 0.5)
        return x.to(data.x_train), y.to(data.y_train), inside


@component
class CanarySilos:
    """A dataset with silos that are canaries, of one sample each."""

    data: Annotated[Dataset, DATASETS]
    """the dataset"""
    count: PositiveInt
    """number of canaries"""

    @property
    def names(self) -> list[str]:
        """The canaries."""
        return [f"canary-{number:05d}" for number in range(self.count)]

    def source(self, seed: int) -> Source:
        """The dataset's silos, then the canaries."""
        inner = self.data.source(seed)
        if inner.shared is not None:
            raise ConfigError("audit: a canary silo has no file to pool; data.statistics: silo")
        first, names = inner.silos[0].id, set(self.names)

        def opened(name: str) -> SiloData:
            if name not in names:
                return inner.open(name)
            data = inner.open(first)
            if isinstance(data.x_train, Streamed):
                raise ConfigError("audit: it takes a sample in memory for each canary; data.stream: false")
            return SiloData(data.x_train[:1], data.y_train[:1], data.x_test[:0], data.y_test[:0])

        return replace(inner, silos=(*inner.silos, *(Silo(name, 1) for name in self.names)), open=opened)


class Planted(Transform):
    """Puts a vector in place of the update of each canary, and then does what `inner` does, if there is one."""

    changes: ClassVar[bool] = True

    def __init__(self, seed: int, sent: dict[str, float], inner: Transform | None) -> None:
        """`sent`: the norm of each canary's update; 0: it is out."""
        self._seed, self._sent, self._inner = seed, sent, inner

    def direction(self, silo: str, num: int) -> torch.Tensor:
        """A canary's direction, of norm 1, [P]."""
        drawn_P = rng.generator(self._seed, purpose="canary silo", silo=silo).standard_normal(num, dtype=np.float32)
        return torch.from_numpy(drawn_P / np.linalg.norm(drawn_P))

    def on_silo(self, update: Contribution, state: State, about: About) -> bool:
        if (norm := self._sent.get(update.silo)) is not None:
            delta_P = update[DELTA]
            delta_P.copy_(self.direction(update.silo, len(delta_P)).to(delta_P).mul_(norm))
        return True if self._inner is None else self._inner.on_silo(update, state, about)

    def on_mean(self, mean_S: torch.Tensor, start: int, share: float, state: State, about: About) -> None:
        if self._inner is not None:
            self._inner.on_mean(mean_S, start, share, state, about)


def p_value(num: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound of the probability that so many of the guesses about `num` canaries are correct under (epsilon,
    delta)-DP (Theorem 5.2).

    >>> round(p_value(100, 50, 50, 0.0, 0.0) * 2**50, 6), p_value(100, 50, 25, 5.0, 1e-5)
    (1.0, 1.0)
    """
    from scipy.stats import binom

    rate = 1 / (1 + math.exp(-epsilon))  # accuracy of randomised response
    beta = float(binom.sf(correct - 1, guesses, rate))
    steps = np.arange(1, correct + 1)
    below = np.cumsum(binom.pmf(correct - steps, guesses, rate)) if correct else np.zeros(1)
    alpha = float((below / (steps if correct else 1)).max())
    return min(1.0, beta + alpha * delta * 2 * num)


def lower_bound(num: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon that so many correct guesses refute at this confidence; 0 if there is none."""

    def refuted(value: float) -> bool:
        return p_value(num, guesses, correct, value, delta) < 1 - confidence

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit(
    config: Config,
    silo: str | None = None,
    canaries: int = 200,
    scale: float = 1.0,
    confidence: float = 0.95,
    silos: bool = False,
) -> dict[str, Any]:
    """Train with canaries in one silo, by default the largest, in a temporary run directory on this process, and guess.
    With `privacy: silo`, or `silos`, the canaries are silos.

    Returns the bound, what it would be if all guesses were right, the account's epsilon of this silo's records or of
    silos (None without `privacy`), and counts. Raises ConfigError for what cannot be audited."""
    private = config.privacy
    if not 0 < confidence < 1 or canaries < 8:
        raise ConfigError("audit: give 8 canaries or more, and a confidence between 0 and 1")
    if not 0 < scale < math.inf:
        raise ConfigError(f"audit: scale is {scale}; canaries need a finite scale above 0")
    if silos or (private is not None and not private.of_records):
        return _of_silos(config, silo, canaries, scale, confidence)
    source = config.data.source(config.seed)
    name = silo or _largest(source)
    data = Canaried(data=config.data, silo=name, count=canaries, scale=scale, all_rows=private is not None)
    data.source(config.seed)
    delta = 0.0 if private is None else private.delta
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        how = replace(config, data=data, out=str(out), evaluate=replace(config.evaluate, every=config.rounds))
        with Run(how, comm=SoloComm()) as run:
            objective, device = run.federation.objective, run.federation.model.device
            fresh = source.open(name)
            x, y, inside = data.canaries(fresh, config.seed, source.num_classes)
            if (spending := run.federation.private) is not None:
                present = np.concatenate([np.ones(len(fresh.x_train), np.bool_), inside.numpy()])
                spending.guard = _without(spending.guard, name, present)
            losses = _losses(run, objective.loss, x.to(device), y.to(device))
            before = losses()
            for _ in run:
                pass
            fell = before - losses()
            spent = None if private is None else _spent(json.loads((out / FILE).read_text()), name)
    return {"silo": name, **_guessed(fell.numpy(), inside.numpy(), delta, confidence), "epsilon_at_most": spent}


def _largest(source: Source) -> str:
    """The silo with most training samples; those that declare no number are opened and counted."""
    sizes = {one.id: one.num_samples for one in source.silos}
    if len(sizes) > 1:
        sizes = {name: len(source.open(name).x_train) if num is None else num for name, num in sizes.items()}
    return max(sizes, key=lambda name: sizes[name] or 0)


def _of_silos(config: Config, silo: str | None, canaries: int, scale: float, confidence: float) -> dict[str, Any]:
    """The audit of whole silos."""
    private = config.privacy
    if private is not None and not isinstance(private, SiloPrivacy):
        raise ConfigError("audit: silos are canaries, and privacy: record protects records; leave --silos out")
    if silo is not None:
        raise ConfigError("audit: with silos as canaries no silo gets any; leave --silo out")
    if private is not None and private.quantile is not None:
        raise ConfigError("audit: the norm of silo canaries follows a fixed clip; leave privacy.quantile out")
    if not isinstance(config.aggregate, Mean) or config.aggregate.weights != "uniform":
        raise ConfigError("audit: canary silos have one sample each; take aggregate: {name: mean, weights: uniform}")
    data = CanarySilos(data=config.data, count=canaries)
    inside_N = rng.generator(config.seed, purpose="canary silos").random(canaries) < 0.5
    norm = scale if private is None else private.clip
    sent = dict(zip(data.names, (norm * inside_N).tolist(), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        how = replace(config, data=data, out=str(out), evaluate=replace(config.evaluate, every=config.rounds))
        with Run(how, comm=SoloComm()) as run:
            fed = run.federation
            given = fed.updates.transforms[1:-1]  # between the checks
            planted = Planted(config.seed, sent, given[-1] if private is not None else None)
            fed.updates = Updates((planted,) if private is not None else (*given, planted))
            start_P = run.parameters.clone()
            for _ in run:
                pass
            moved_P = (run.parameters - start_P).double().cpu()
            spent = None if private is None else _spent(json.loads((out / FILE).read_text()), "")
    score_N = np.array([float(moved_P @ planted.direction(name, len(moved_P)).double()) for name in data.names])
    delta = 0.0 if private is None else private.delta
    return {"silo": None, **_guessed(score_N, inside_N, delta, confidence), "epsilon_at_most": spent}


def _guessed(
    score_N: npt.NDArray[Any], inside_N: npt.NDArray[np.bool_], delta: float, confidence: float
) -> dict[str, Any]:
    """What guesses by these scores, high for canaries that are in, say of epsilon."""
    order, canaries = np.argsort(score_N, kind="stable"), len(score_N)
    each = canaries // 4  # guesses of either kind, fixed before anything was seen
    correct = int((~inside_N[order[:each]]).sum() + inside_N[order[-each:]].sum())
    bound, most = (lower_bound(canaries, 2 * each, right, delta, confidence) for right in (correct, 2 * each))
    return {
        "canaries": canaries,
        "guesses": 2 * each,
        "correct": correct,
        "confidence": confidence,
        "delta": delta,
        "epsilon_at_least": bound,
        "epsilon_if_all_right": most,
    }


def _without(
    guard: Callable[[str, int], Guard | None], silo: str, present_N: npt.NDArray[np.bool_]
) -> Callable[[str, int], Guard | None]:
    """The guard of a round, whose samples of `silo` hold only rows that are present. The number of rows, and with it
    rates and steps, stays that of all: neighbours differ in one canary and in nothing else."""

    def changed(name: str, number: int) -> Guard | None:
        found = guard(name, number)
        assert isinstance(found, DpSgd)
        return replace(found, present_N=present_N) if name == silo else found

    return changed


def _losses(
    run: Run, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A function that computes each canary's loss under the run's global parameters, float64 [N]."""

    def compute() -> torch.Tensor:
        model = run.federation.model
        model.load(run.parameters)
        twin = model.twin().module.eval()
        with torch.no_grad():
            return losses_of(loss, twin(x), y).double().cpu()

    return compute


def _spent(account: dict[str, Any], silo: str) -> float:
    uses = {Use.of(row): row["count"] for row in account["uses"] if row["silo"] == silo}
    return epsilon(uses, account["delta"])
