"""`fedmpi audit`: an empirical lower bound of epsilon, beside the account.

One run is audited with many canaries (Steinke, Nasr & Jagielski 2023, Privacy Auditing with One (1) Training Run): each
canary, a noisy sample with a random label, is in a silo's training data with probability 1/2. After training the
canaries whose loss fell most are guessed to have been in, those whose loss fell least to have been out. Under
(epsilon, delta)-DP the number of correct guesses is bounded (Theorem 5.2); a number beyond that refutes it.

A small bound proves nothing: the attack sees the last parameters only. A bound above the account means a bug.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch

from fedmpi import rng
from fedmpi.comm import SoloComm
from fedmpi.components import PositiveFloat, PositiveInt, component, did_you_mean
from fedmpi.config import Config
from fedmpi.data import DATASETS
from fedmpi.errors import ConfigError
from fedmpi.local.base import Guard
from fedmpi.privacy.account import Use, epsilon
from fedmpi.privacy.per_sample import losses_of
from fedmpi.privacy.record import DpSgd
from fedmpi.privacy.spending import FILE
from fedmpi.train import Run
from fedmpi.types import Dataset, SiloData, Source, Streamed


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
    config: Config, silo: str | None = None, canaries: int = 200, scale: float = 1.0, confidence: float = 0.95
) -> dict[str, Any]:
    """Train with canaries in one silo, by default the largest, in a temporary run directory on this process, and guess.

    Returns the bound, the account's epsilon of this silo's records (None without `privacy: record`), and counts.
    Raises ConfigError for what cannot be audited."""
    private = config.privacy
    if private is not None and not private.of_records:
        raise ConfigError("audit: canaries are records; privacy: silo protects whole silos, of which a run has too few")
    if not 0 < confidence < 1 or canaries < 8:
        raise ConfigError("audit: give 8 canaries or more, and a confidence between 0 and 1")
    source = config.data.source(config.seed)
    name = silo or max(source.silos, key=lambda one: one.num_samples or 0).id
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
    order = np.argsort(fell.numpy(), kind="stable")
    each = canaries // 4  # guesses of either kind, fixed before anything was seen
    correct = int((~inside[order[:each]]).sum() + inside[order[-each:]].sum())
    bound = lower_bound(canaries, 2 * each, correct, delta, confidence)
    return {
        "silo": name,
        "canaries": canaries,
        "guesses": 2 * each,
        "correct": correct,
        "confidence": confidence,
        "delta": delta,
        "epsilon_at_least": bound,
        "epsilon_at_most": spent,
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
