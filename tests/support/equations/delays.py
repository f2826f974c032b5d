"""Silos that do as much as fits into a time, by their measured delays: FedQueue's budgets under both engines."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedmpi.components import build
from fedmpi.rounds.clocks import Virtual
from support.equations import IDS, ROUNDS, SIZES, Case, Problem
from support.equations.asynchronous import polynomial

LR, MOST, BETA, THETA, BUDGET = 0.05, 9, 0.4, 0.2, 3.0
CLOCK: dict[str, Any] = {
    "name": "virtual",
    "compute": {"name": "lognormal", "median": 3.0, "sigma": 0.3},  # of MOST steps
    "slower": {"b": 3.0, "d": 0.4, "e": 1.7},
    "delay": {"name": "uniform", "low": 0.1, "high": 0.9},
}
ALL = tuple(range(len(IDS)))


def seconds(k: int, number: int) -> tuple[float, float]:
    """Seconds of a step, and of the transfers."""
    values = {name: value for name, value in CLOCK.items() if name != "name"}
    compute_s, delay_s = build(Virtual, values).parts(0, IDS[k], number, SIZES[k])
    return compute_s / MOST, delay_s


class Means:
    """q_k and c_k (Li et al. 2026, FedQueue): exponential means of the waits, and of the seconds of a step."""

    def __init__(self, rates: str = "fewest", first: int = MOST) -> None:
        self.q: dict[int, float] = {}
        self.c: dict[int, float] = {}
        self.rates, self.first = rates, first
        self.taken: set[int] = set()

    def measured(self, k: int, wait: float, step: float) -> None:
        self.q[k] = (1 - BETA) * self.q[k] + BETA * wait if k in self.q else wait
        self.c[k] = (1 - BETA) * self.c[k] + BETA * step if k in self.c else step

    def steps(self, k: int) -> int:
        """E_k."""
        if k not in self.q:
            return self.first
        return min(MOST, max(1, math.floor((BUDGET - THETA - self.q[k]) / self.c[k])))

    def told(self, k: int, cohort: Sequence[int] = ALL) -> tuple[int, float]:
        """E_k and the learning rate."""
        numbers = [self.steps(other) for other in cohort]
        reference = min(numbers) if self.rates == "fewest" else sum(numbers) / len(numbers)
        self.taken.add(self.steps(k))
        scale = 1.0 if self.rates == "equal" else min(10.0, max(0.1, reference / self.steps(k)))
        return self.steps(k), LR * scale


def moved(problem: Problem, w: np.ndarray, k: int, number: int, lr: float) -> np.ndarray:
    y = w
    for batch in problem.steps(k, number):
        y = y - lr * problem.gradient(y, batch)
    return y - w


def synchronous(rates: str, first: int = MOST) -> Callable[[Problem], list[np.ndarray]]:
    def wanted(problem: Problem) -> list[np.ndarray]:
        w, means, after = problem.start_P, Means(rates, first), []
        for number, cohort in enumerate(problem.cohorts):
            told = {k: means.told(k, cohort) for k in cohort}
            w = w + sum(p * moved(problem, w, k, *told[k]) for p, k in zip(problem.shares(cohort), cohort, strict=True))
            for k in cohort:
                step, wait = seconds(k, number)
                means.measured(k, wait, step)
            after.append(w)
        assert len(means.taken) > 3
        return after

    return wanted


def buffered(size: int, rates: str, cutoff: float | None = None) -> Callable[[Problem], list[np.ndarray]]:
    """FedBuff. A training follows the means after the version that it starts from."""

    def wanted(problem: Problem) -> list[np.ndarray]:
        w, means, versions, t = problem.start_P, Means(rates), [problem.start_P], 0
        under_way: dict[int, dict[str, Any]] = {}
        numbers = [-1] * len(IDS)
        late = 0

        def fetch(k: int, now: float) -> None:
            numbers[k] += 1
            step, wait = seconds(k, numbers[k])
            e, lr = told[k]
            latest = (
                means_then.q[k] + cutoff * max(BUDGET, e * means_then.c[k]) if cutoff and k in means_then.q else 1e9
            )
            about = {"end": now + e * step + wait, "wait": wait, "step": step, "e": e, "lr": lr}
            under_way[k] = {**about, "version": t, "late": e * step + wait > latest}

        def tell() -> tuple[dict[int, tuple[int, float]], Means]:
            then = Means(rates)
            then.q, then.c = dict(means.q), dict(means.c)
            return {k: means.told(k) for k in range(len(IDS))}, then

        told, means_then = tell()
        for k in range(len(IDS)):
            fetch(k, 0.0)
        while t < ROUNDS:
            heard, buffer, now, last = [], [], 0.0, 0
            while len(buffer) < size:
                k = last = min(under_way, key=lambda k: (under_way[k]["end"], k))
                one = under_way.pop(k)
                now = one["end"]
                heard.append((k, one))
                if one["late"]:
                    late += 1
                else:
                    delta = moved(problem, versions[one["version"]], k, one["e"], one["lr"])
                    buffer.append(polynomial(t - one["version"]) * delta)
                if len(buffer) < size:
                    fetch(k, now)
            w = w + sum(buffer) / size
            t += 1
            versions.append(w)
            for k, one in heard:
                means.measured(k, one["wait"], one["step"])
            told, means_then = tell()
            fetch(last, now)
        assert len(means.taken) > 3 and bool(late) == (cutoff is not None)
        return versions[1:]

    return wanted


def case(wanted: Callable[[Problem], list[np.ndarray]], engine: dict[str, Any], **amount: Any) -> Case:
    asynchronous = engine["name"] == "buffered"
    budget = {"name": "by_delay", "budget_s": BUDGET, "margin_s": THETA, "beta": BETA, **amount}
    config: dict[str, Any] = {
        "local": {"name": "sgd", "lr": LR, "steps": MOST, "amount": budget},
        "engine": engine | {"clock": CLOCK},
    }
    return Case(config | ({"aggregate": {"name": "mean", "weights": "uniform"}} if asynchronous else {}), wanted)


SYNC, BUFFERED = {"name": "synchronous"}, {"name": "buffered"}

CASES = {
    "by_delay": case(synchronous("fewest"), SYNC),
    "by_delay_mean": case(synchronous("mean", 4), SYNC, rates="mean", first=4),
    "by_delay_async": case(buffered(1, "fewest"), BUFFERED),
    "by_delay_buffered": case(buffered(3, "equal"), BUFFERED | {"size": 3}, rates="equal"),
    "by_delay_cutoff": case(buffered(4, "mean", 1.0), BUFFERED | {"size": 4}, rates="mean", cutoff=1.0),
}
