"""Silos that choose the length or the number of their steps."""

import numpy as np

from fedmpi import rng
from support.equations import HALF, IDS, SIZES, Case, Problem

LR = 0.05


def sgd(problem: Problem, w: np.ndarray, batches: list) -> tuple[np.ndarray, float]:
    """The parameters after these steps, and the mean loss over their samples."""
    losses, seen, y = 0.0, 0, w
    for x, target in batches:
        losses += float(((x @ y[:-1] + y[-1] - target) ** 2).sum())
        seen += len(x)
        y = y - LR * problem.gradient(y, (x, target))
    return y, losses / seen


def nova(problem: Problem, cohort: list[int], w: np.ndarray, ends: list, taus: list) -> np.ndarray:
    """Wang et al. 2020, equations 8 and 9."""
    p = problem.shares(cohort)
    return w + sum(p * taus) * sum(a * (y - w) / t for a, y, t in zip(p, ends, taus, strict=True))


def by_loss(problem: Problem) -> list[np.ndarray]:
    """min(E_max, max(1, round(L_k / L_target))) steps, E_max in the first round; FedAvg."""
    w, last, after, taken = problem.start_P, {}, [], set()
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            number = min(9, max(1, round(last[k] / 0.4))) if k in last else 9
            taken.add(number)
            y, last[k] = sgd(problem, w, problem.steps(k, number))
            ends.append(y)
        w = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        after.append(w)
    assert len(taken) > 2
    return after


def drawn(problem: Problem) -> list[np.ndarray]:
    """1 to 4 epochs, every silo and round anew; FedNova."""
    w, after, taken = problem.start_P, [], set()
    for number, cohort in enumerate(problem.cohorts, start=1):
        ends, taus = [], []
        for k in cohort:
            draw = rng.generator(0, purpose="amount", round=number, silo=IDS[k])
            epochs = int(draw.integers(1, 5))
            taken.add(epochs)
            batches = problem.epochs(k, epochs)
            ends.append(sgd(problem, w, batches)[0])
            taus.append(len(batches))
        w = nova(problem, cohort, w, ends, taus)
        after.append(w)
    assert len(taken) > 2
    return after


def by_silo(problem: Problem) -> list[np.ndarray]:
    """Three epochs of silo b, two of d, one of the others; FedNova."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        ends, taus = [], []
        for k in cohort:
            batches = problem.epochs(k, {"b": 3, "d": 2}.get(IDS[k], 1))
            ends.append(sgd(problem, w, batches)[0])
            taus.append(len(batches))
        w = nova(problem, cohort, w, ends, taus)
        after.append(w)
    return after


def adagrad_norm(with_nova: bool, rho: float = 0.0):
    """Ward et al. 2019, Algorithm 1, b_0^2 = 0.04, eta 0.3.

    With FedNova, |a_k|_1 is the sum of the 1/b, each times its factor from momentum rho until the end of the round.
    """

    def wanted(problem: Problem) -> list[np.ndarray]:
        w, squares, after = problem.start_P, [0.04] * len(SIZES), []
        for cohort in problem.cohorts:
            ends, lengths = [], []
            for k in cohort:
                y, length, buffer, batches = w, 0.0, 0.0, problem.epochs(k, 1)
                for left, batch in zip(range(len(batches), 0, -1), batches, strict=True):
                    g = problem.gradient(y, batch)
                    squares[k] += g @ g
                    buffer = rho * buffer + g / np.sqrt(squares[k])
                    y = y - 0.3 * buffer
                    length += sum(rho**i for i in range(left)) / np.sqrt(squares[k])
                ends.append(y)
                lengths.append(length)
            if with_nova:
                w = nova(problem, cohort, w, ends, lengths)
            else:
                w = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
            after.append(w)
        return after

    return wanted


ADAGRAD = {"name": "adagrad_norm", "lr": 0.3, "eps": 0.04, "epochs": 1}

CASES = {
    "by_loss": Case(
        {"local": {"name": "sgd", "steps": 9, "amount": {"name": "by_loss", "target": 0.4}}, "select": HALF}, by_loss
    ),
    "drawn": Case(
        {"local": {"name": "sgd", "epochs": 4, "amount": "drawn"}, "select": HALF, "aggregate": "fednova"}, drawn
    ),
    "by_silo": Case(
        {
            "local": {"name": "sgd", "epochs": 1, "amount": {"name": "by_silo", "silos": {"b": 3, "d": 2}}},
            "select": HALF,
            "aggregate": "fednova",
        },
        by_silo,
    ),
    "adagrad_norm": Case({"local": ADAGRAD, "select": HALF}, adagrad_norm(False)),
    "adagrad_norm_nova": Case({"local": ADAGRAD, "select": HALF, "aggregate": "fednova"}, adagrad_norm(True)),
    "adagrad_norm_momentum": Case(
        {
            "local": {**ADAGRAD, "optimizer": {"name": "SGD", "momentum": 0.6}},
            "select": HALF,
            "aggregate": "fednova",
        },
        adagrad_norm(True, 0.6),
    ),
}
