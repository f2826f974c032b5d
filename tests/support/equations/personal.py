"""Rules with a model per silo: global parameters and the silos' own after every round."""

from typing import Any

import numpy as np

from support.equations import HALF, Case, Problem, own_layers, own_model

LR = 0.05
Rounds = list[tuple[np.ndarray, dict[int, np.ndarray]]]


def mean(problem: Problem, cohort: Any, ends: list[np.ndarray]) -> np.ndarray:
    return sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))


def ditto(lam: float, s: int, own_lr: float = LR) -> Any:
    """Li et al. 2021, Algorithm 1: r = 4 steps of w and s of v, both from the first batch on."""

    def wanted(problem: Problem) -> Rounds:
        w, v, after = problem.start_P, {}, []
        for cohort in problem.cohorts:
            ends = []
            for k in cohort:
                v.setdefault(k, w)
                at = problem._cursor[k]
                for batch in problem.steps(k, s):
                    v[k] = v[k] - own_lr * (problem.gradient(v[k], batch) + lam * (v[k] - w))
                problem._cursor[k] = at
                y = w
                for batch in problem.steps(k, 4):
                    y = y - LR * problem.gradient(y, batch)
                ends.append(y)
            w = mean(problem, cohort, ends)
            after.append((w, dict(v)))
        return after

    return wanted


def apfl(start_alpha: float, adapt: bool) -> Any:
    """Deng et al. 2020, Algorithm 1, with its step of alpha."""

    def wanted(problem: Problem) -> Rounds:
        w, v, alpha, after = problem.start_P, {}, {}, []
        for cohort in problem.cohorts:
            ends = []
            for k in cohort:
                v.setdefault(k, w)
                alpha.setdefault(k, start_alpha)
                y = w
                for batch in problem.epochs(k, 1):
                    g = problem.gradient(alpha[k] * v[k] + (1 - alpha[k]) * y, batch)
                    new_alpha = alpha[k] - LR * float((v[k] - y) @ g) * adapt
                    y, v[k] = y - LR * problem.gradient(y, batch), v[k] - LR * alpha[k] * g
                    alpha[k] = min(1.0, max(0.0, new_alpha))
                ends.append(y)
            w = mean(problem, cohort, ends)
            after.append((w, {k: alpha[k] * v[k] + (1 - alpha[k]) * w for k in v}))
        if adapt:
            assert len({round(a, 6) for a in alpha.values()}) == len(alpha) > 1, "alpha has not moved"
        return after

    return wanted


def fedper(problem: Problem) -> Rounds:
    """Arivazhagan et al. 2019, Algorithm 1: base and personal layer (the bias) trained together."""
    w, b, after = problem.start_P, {}, []
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            y = np.append(w, b.get(k, problem.start_own))
            for batch in problem.epochs(k, 1):
                y = y - LR * problem.gradient(y, batch)
            ends.append(y[:-1])
            b[k] = y[-1:]
        w = mean(problem, cohort, ends)
        after.append((w, dict(b)))
    return after


def fedrep(problem: Problem) -> Rounds:
    """Collins et al. 2021, Algorithm 1: three steps of the head (the bias), then two of the body."""
    w, b, after = problem.start_P, {}, []
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            head, body = b.get(k, problem.start_own), w
            for batch in problem.steps(k, 3):
                head = head - 0.1 * problem.gradient(np.append(body, head), batch)[-1:]
            for batch in problem.steps(k, 2):
                body = body - LR * problem.gradient(np.append(body, head), batch)[:-1]
            ends.append(body)
            b[k] = head
        w = mean(problem, cohort, ends)
        after.append((w, dict(b)))
    return after


def per_fedavg(problem: Problem) -> list[np.ndarray]:
    """Fallah et al. 2020, Algorithm 1 without the Hessian; D and D' are a batch's halves, if it has four samples."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            y = w
            for x, target in problem.epochs(k, 1):
                half = -(-len(x) // 2)
                first, second = (x[:half], target[:half]), (x[half:], target[half:])
                if len(x) < 4:
                    first = second = (x, target)
                y = y - LR * problem.gradient(y - 0.1 * problem.gradient(y, first), second)
            ends.append(y)
        w = mean(problem, cohort, ends)
        after.append(w)
    return after


def reptile(problem: Problem) -> list[np.ndarray]:
    """Nichol et al. 2018, Algorithm 2 (batched): phi + epsilon / n sum (U_k(phi) - phi), epsilon 0.5; U is SGD."""
    phi, after = problem.start_P, []
    for cohort in problem.cohorts:
        directions = []
        for k in cohort:
            y = phi
            for batch in problem.steps(k, 4):
                y = y - LR * problem.gradient(y, batch)
            directions.append(y - phi)
        phi = phi + 0.5 / len(cohort) * sum(directions)
        after.append(phi)
    return after


HEAD = {"parameters": ["*", "!bias"]}

CASES = {
    "ditto": Case({"local": {"name": "ditto", "lam": 0.5, "steps": 4}, "select": HALF}, ditto(0.5, 4), own=own_model),
    "ditto_longer": Case(
        {"local": {"name": "ditto", "lam": 0.0, "steps": 4, "personal_steps": 7, "personal_lr": 0.02}, "select": HALF},
        ditto(0.0, 7, 0.02),
        own=own_model,
    ),
    "apfl": Case({"local": {"name": "apfl", "epochs": 1}, "select": HALF}, apfl(0.5, True), own=own_model),
    "apfl_fixed": Case(
        {"local": {"name": "apfl", "epochs": 1, "alpha": 0.3, "adapt": False}, "select": HALF},
        apfl(0.3, False),
        own=own_model,
    ),
    "fedper": Case(
        {"local": {"name": "sgd", "epochs": 1}, "select": HALF, "exchange": HEAD}, fedper, own=own_layers
    ),
    "fedrep": Case(
        {"local": {"name": "fedrep", "steps": 2, "head_steps": 3, "head_lr": 0.1}, "select": HALF, "exchange": HEAD},
        fedrep,
        own=own_layers,
    ),
    "per_fedavg": Case({"local": {"name": "per_fedavg", "inner_lr": 0.1, "epochs": 1}, "select": HALF}, per_fedavg),
    "reptile": Case(
        {
            "local": {"name": "sgd", "steps": 4},
            "select": HALF,
            "aggregate": {"name": "mean", "weights": "uniform"},
            "server": {"optimizer": {"name": "fedavg", "lr": 0.5}},
        },
        reptile,
    ),
}  # fmt: skip
