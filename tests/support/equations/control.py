"""Rules that correct the gradient, and normalized averaging."""

import numpy as np

from support.equations import HALF, Case, Problem

LR = 0.05


def fedavg(problem: Problem) -> list[np.ndarray]:
    """McMahan et al. 2017, Algorithm 1, one epoch."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            y = w
            for batch in problem.epochs(k, 1):
                y = y - LR * problem.gradient(y, batch)
            ends.append(y)
        w = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        after.append(w)
    return after


def fedprox(problem: Problem) -> list[np.ndarray]:
    """Li et al. 2020, Algorithm 2, four steps, mu 0.5."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            y = w
            for batch in problem.steps(k, 4):
                y = y - LR * (problem.gradient(y, batch) + 0.5 * (y - w))
            ends.append(y)
        w = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        after.append(w)
    return after


def scaffold(problem: Problem) -> list[np.ndarray]:
    """Karimireddy et al. 2020, Algorithm 1, Option II, four steps; deltas weighted by samples."""
    x, c = problem.start_P, np.zeros_like(problem.start_P)
    own = [np.zeros_like(c) for _ in range(problem.num_silos)]
    after = []
    for cohort in problem.cohorts:
        ends, changes = [], []
        for k in cohort:
            y = x
            for batch in problem.steps(k, 4):
                y = y - LR * (problem.gradient(y, batch) - own[k] + c)
            new = own[k] - c + (x - y) / (4 * LR)
            changes.append(new - own[k])
            ends.append(y)
            own[k] = new
        x = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        c = c + sum(changes) / problem.num_silos
        after.append(x)
    return after


def fednova(problem: Problem) -> list[np.ndarray]:
    """Wang et al. 2020, Algorithm 1 with plain local steps: |a_k|_1 = tau_k, which differs with the silos' sizes."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        directions, taus = [], []
        for k in cohort:
            y, batches = w, problem.epochs(k, 1)
            for batch in batches:
                y = y - LR * problem.gradient(y, batch)
            taus.append(len(batches))
            directions.append((w - y) / (LR * len(batches)))
        p = problem.shares(cohort)
        tau_eff = sum(p * taus)
        w = w - tau_eff * LR * sum(a * d for a, d in zip(p, directions, strict=True))
        after.append(w)
    return after


CASES = {
    "fedavg": Case({"local": {"name": "sgd", "epochs": 1}, "select": HALF}, fedavg),
    "fedprox": Case({"local": {"name": "fedprox", "mu": 0.5, "steps": 4}, "select": HALF}, fedprox),
    "scaffold": Case({"local": {"name": "scaffold", "steps": 4}, "select": HALF}, scaffold),
    "scaffold_sharded": Case(
        {"local": {"name": "scaffold", "steps": 4}, "select": HALF, "exchange": {"plan": "sharded"}}, scaffold
    ),
    "scaffold_window": Case(
        {"local": {"name": "scaffold", "steps": 4}, "select": HALF, "exchange": {"plan": "window"}}, scaffold
    ),
    "scaffold_silos": Case(
        {"local": {"name": "scaffold", "steps": 4}, "select": HALF, "exchange": {"plan": "sharded", "scope": "silo"}},
        scaffold,
    ),
    "scaffold_ring": Case(
        {
            "local": {"name": "scaffold", "steps": 4},
            "select": HALF,
            "exchange": {"plan": "root", "reduction": "reproducible"},
        },
        scaffold,
    ),
    "fednova": Case({"local": {"name": "sgd", "epochs": 1}, "select": HALF, "aggregate": "fednova"}, fednova),
}
