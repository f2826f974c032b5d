"""Cohorts weighted by 1/probability, and other weights of silos."""

import numpy as np

from support.equations import HALF, IDS, SIZES, Case, Problem
from support.equations.control import LR


def _ends(problem: Problem, w: np.ndarray, cohort: list[int], steps: int = 4) -> dict[int, np.ndarray]:
    """The last parameters of each silo in the cohort."""
    found = {}
    for k in cohort:
        y = w
        for batch in problem.steps(k, steps):
            y = y - LR * problem.gradient(y, batch)
        found[k] = y
    return found


def inverse(problem: Problem) -> list[np.ndarray]:
    """sum over the cohort of (K/S) (n_k/n) delta_k, S = 3 of K = 5."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        assert len(cohort) == 3
        ends = _ends(problem, w, cohort)
        w = w + sum(5 / 3 * problem.n[k] / problem.n.sum() * (y - w) for k, y in ends.items())
        after.append(w)
    return after


def optimal(problem: Problem) -> list[np.ndarray]:
    """Chen et al. 2022, eq. 7 with m = 2, norms of last participations, and a tenth of m/K for every silo.

    The update is the sum over the cohort of (n_k/n) delta_k / p_k, times the probability that any silo is drawn.
    """
    w, after, m, K = problem.start_P, [], 2, problem.num_silos
    norms: dict[int, float] = {}
    for cohort in problem.cohorts:
        largest = max(norms.values(), default=1.0)
        u = {k: problem.n[k] * norms.get(k, largest) for k in range(K)}
        rising = sorted(range(K), key=u.__getitem__)
        fitting = [
            n for n in range(1, K + 1) if 0 < m + n - K <= sum(u[k] for k in rising[:n]) / u[rising[n - 1]] + 1e-12
        ]
        small = rising[: max(fitting)]
        p = dict.fromkeys(range(K), 1.0)
        p |= {k: (m + len(small) - K) * u[k] / sum(u[j] for j in small) for k in small}
        p = {k: 0.1 * m / K + 0.9 * p[k] for k in p}
        somebody = 1 - np.prod([1 - q for q in p.values()])
        ends = _ends(problem, w, cohort)
        norms |= {k: float(np.linalg.norm(y - w)) for k, y in ends.items()}
        w = w + sum(somebody / p[k] * problem.n[k] / problem.n.sum() * (y - w) for k, y in ends.items())
        after.append(w)
    return after


def by_steps(problem: Problem) -> list[np.ndarray]:
    """The steps of one epoch replace n_k."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        moves, steps = [], []
        for k in cohort:
            y, batches = w, problem.epochs(k, 1)
            for batch in batches:
                y = y - LR * problem.gradient(y, batch)
            moves.append(y - w)
            steps.append(len(batches))
        w = w + sum(s * d for s, d in zip(steps, moves, strict=True)) / sum(steps)
        after.append(w)
    return after


OWN = dict(zip(IDS, (3.0, 0.5, 1.0, 2.0, 0.25), strict=True))


def by_own(problem: Problem) -> list[np.ndarray]:
    """The user's own weights, normalized over the cohort."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        ends = _ends(problem, w, cohort)
        total = sum(OWN[IDS[k]] for k in cohort)
        w = sum(OWN[IDS[k]] / total * y for k, y in ends.items())
        after.append(w)
    return after


def uniform(problem: Problem) -> list[np.ndarray]:
    """Equal weights."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        w = sum(_ends(problem, w, cohort).values()) / len(cohort)
        after.append(w)
    return after


def qffl(q: float) -> object:
    def qfedavg(problem: Problem) -> list[np.ndarray]:
        """Li et al. 2020 (Fair Resource Allocation), Algorithm 2, in the paper's notation."""
        L = 1 / LR
        w, after = problem.start_P, []
        for cohort in problem.cohorts:
            Delta, h = np.zeros_like(w), 0.0
            F = {k: problem.loss(w, k) + 1e-10 for k in cohort}
            for k, y in _ends(problem, w, cohort).items():
                Delta_w = L * (w - y)
                Delta = Delta + F[k] ** q * Delta_w
                h += q * F[k] ** (q - 1) * (Delta_w @ Delta_w) + L * F[k] ** q
            w = w - Delta / h
            after.append(w)
        return after

    return qfedavg


LOCAL = {"local": {"name": "sgd", "steps": 4}}
INVERSE = {"name": "uniform", "fraction": 0.6, "weights": "inverse"}
OPTIMAL = {"name": "optimal", "fraction": 0.4}
assert len(SIZES) == 5
CASES = {
    "inverse": Case({**LOCAL, "select": INVERSE}, inverse),
    "inverse_sharded": Case({**LOCAL, "select": INVERSE, "exchange": {"plan": "sharded", "scope": "silo"}}, inverse),
    "inverse_ring": Case(
        {**LOCAL, "select": INVERSE, "exchange": {"plan": "root", "reduction": "reproducible"}}, inverse
    ),
    "optimal": Case({**LOCAL, "select": OPTIMAL}, optimal),
    "optimal_window": Case({**LOCAL, "select": OPTIMAL, "exchange": {"plan": "window"}}, optimal),
    "by_steps": Case(
        {"local": {"name": "sgd", "epochs": 1}, "select": HALF, "aggregate": {"name": "mean", "weights": "steps"}},
        by_steps,
    ),
    "by_own": Case({**LOCAL, "select": HALF, "aggregate": {"name": "mean", "weights": OWN}}, by_own),
    "uniform": Case({**LOCAL, "select": HALF, "aggregate": {"name": "mean", "weights": "uniform"}}, uniform),
    "qffl_0_is_uniform": Case({**LOCAL, "select": HALF, "aggregate": {"name": "qffl", "q": 0, "lr": LR}}, uniform),
    "qffl_1": Case({**LOCAL, "select": HALF, "aggregate": {"name": "qffl", "q": 1, "lr": LR}}, qffl(1)),
    "qffl_half_sharded": Case(
        {
            **LOCAL,
            "select": HALF,
            "aggregate": {"name": "qffl", "q": 0.5, "lr": LR},
            "exchange": {"plan": "sharded", "scope": "silo"},
        },
        qffl(0.5),
    ),
}
