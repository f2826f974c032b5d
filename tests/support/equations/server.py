"""Server optimizers, learning rate schedules, and averaging over rounds."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from support.equations import HALF, ROUNDS, Case, Problem

LR = 0.05


def rounds(problem: Problem, step: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> list[np.ndarray]:
    """Parameters after every round: three local steps per silo, then the server's step(w, delta, t)."""
    w, after = problem.start_P, []
    for t, cohort in enumerate(problem.cohorts, start=1):
        deltas = []
        for k in cohort:
            y = w
            for batch in problem.steps(k, 3):
                y = y - LR * problem.gradient(y, batch)
            deltas.append(y - w)
        delta = sum(p * d for p, d in zip(problem.shares(cohort), deltas, strict=True))
        w = step(w, delta, t)
        after.append(w)
    return after


def fedavgm(problem: Problem) -> list[np.ndarray]:
    """Hsu et al. 2019: v = beta v + delta, w + lr v."""
    v = np.zeros_like(problem.start_P)

    def step(w: np.ndarray, delta: np.ndarray, t: int) -> np.ndarray:
        nonlocal v
        v = 0.8 * v + delta
        return w + 0.5 * v

    return rounds(problem, step)


def nesterov(problem: Problem) -> list[np.ndarray]:
    """Douillard et al. 2023, Algorithm 1, on the pseudo gradient -delta.

    The outer optimizer is that of its experiments (Sutskever et al. 2013 in torch's form).
    """
    buffer = np.zeros_like(problem.start_P)

    def step(w: np.ndarray, delta: np.ndarray, t: int) -> np.ndarray:
        nonlocal buffer
        gradient = -delta
        buffer = 0.9 * buffer + gradient
        return w - 0.7 * (gradient + 0.9 * buffer)

    return rounds(problem, step)


def fedgm(problem: Problem) -> list[np.ndarray]:
    """m = beta m + (1 - beta) delta, w + delta + gamma m."""
    m = np.zeros_like(problem.start_P)

    def step(w: np.ndarray, delta: np.ndarray, t: int) -> np.ndarray:
        nonlocal m
        m = 0.7 * m + (1 - 0.7) * delta
        return w + delta + 0.6 * m

    return rounds(problem, step)


def cosine(problem: Problem) -> list[np.ndarray]:
    """FedAvg with half-cosine lr (Loshchilov & Hutter 2017, equation 5) after two rounds of warmup."""

    def step(w: np.ndarray, delta: np.ndarray, t: int) -> np.ndarray:
        lr = 0.8 * t / 2 if t <= 2 else 0.8 * (1 + math.cos(math.pi * (t - 1) / ROUNDS)) / 2
        return w + lr * delta

    return rounds(problem, step)


def fedadam_linear(problem: Problem) -> list[np.ndarray]:
    """Reddi et al. 2021, Algorithm 2; each round lr falls by a fifth of its first value, but not below 0.3 of it."""
    m, v = np.zeros_like(problem.start_P), np.full_like(problem.start_P, 0.1**2)

    def step(w: np.ndarray, delta: np.ndarray, t: int) -> np.ndarray:
        nonlocal m, v
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta**2
        lr = 0.3 * max(0.3, (ROUNDS - t) / ROUNDS)
        return w + lr * m / (np.sqrt(v) + 0.1)

    return rounds(problem, step)


def averaged(problem: Problem) -> list[np.ndarray]:
    """Average of the parameters as in Kingma & Ba 2015, section 3: a = d a + (1 - d) w from 0, divided by 1 - d**t."""
    a, after = np.zeros_like(problem.start_P), []
    for t, w in enumerate(rounds(problem, lambda w, delta, t: w + delta), start=1):
        a = 0.6 * a + 0.4 * w
        after.append(a / (1 - 0.6**t))
    return after


def unaveraged(problem: Problem) -> list[np.ndarray]:
    """Averaging does not change what is trained."""
    return rounds(problem, lambda w, delta, t: w + delta)


def case(wanted: Any, optimizer: Any, read: str = "parameters", **more: Any) -> Case:
    local = {"name": "sgd", "steps": 3}
    average = more.pop("average", None)
    server = {"optimizer": optimizer, "average": average}
    return Case({"local": local, "select": HALF, "server": server, **more}, wanted, read=read)


NESTEROV = {"name": "fedavgm", "lr": 0.7, "beta": 0.9, "nesterov": True}
COSINE = {"name": "fedavg", "lr": 0.8, "schedule": {"name": "cosine", "warmup": 2}}
ADAM = {"name": "fedadam", "lr": 0.3, "tau": 0.1, "schedule": {"name": "linear", "floor": 0.3}}
AVERAGE = {"decay": 0.6}

CASES = {
    "fedavgm": case(fedavgm, {"name": "fedavgm", "lr": 0.5, "beta": 0.8}),
    "fedavgm_nesterov": case(nesterov, NESTEROV),
    "fedavgm_nesterov_sharded": case(nesterov, NESTEROV, exchange={"plan": "sharded"}),
    "fedgm": case(fedgm, {"name": "fedgm", "beta": 0.7, "gamma": 0.6}),
    "server_cosine": case(cosine, COSINE),
    "server_linear": case(fedadam_linear, ADAM),
    "server_linear_root": case(fedadam_linear, ADAM, exchange={"plan": "root"}),
    "server_linear_window": case(fedadam_linear, ADAM, exchange={"plan": "window"}),
    "average_trains_the_same": case(unaveraged, "fedavg", average=AVERAGE),
    **{
        f"average_{plan}": case(averaged, "fedavg", "averaged_parameters", average=AVERAGE, exchange={"plan": plan})
        for plan in ("replicated", "root", "sharded", "window")
    },
}
