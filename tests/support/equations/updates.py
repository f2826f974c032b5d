"""Transforms of updates before the exchange: clipping, rejection by norm; and the auxiliary vectors of rules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedmpi import rng
from support.equations import HALF, IDS, Case, Problem

LR = 0.05


def rounds(
    problem: Problem,
    change: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray | None]],
    step: Callable[[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]], np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Parameters after every round: three local steps per silo; `change` transforms the deltas (None: rejected).

    The deltas are averaged by samples, then `step(w, mean, shares, deltas)` is applied; by default w + mean.
    """
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        deltas = []
        for k in cohort:
            y = w
            for batch in problem.steps(k, 3):
                y = y - LR * problem.gradient(y, batch)
            deltas.append(y - w)
        taken = [(k, d) for k, d in zip(cohort, change(deltas), strict=True) if d is not None]
        shares, kept = problem.shares([k for k, _ in taken]), [d for _, d in taken]
        mean = sum(p * d for p, d in zip(shares, kept, strict=True))
        w = w + mean if step is None else step(w, mean, shares, kept)
        after.append(w)
    return after


def clipped(delta: np.ndarray, largest: float) -> np.ndarray:
    return delta * min(1.0, largest / np.linalg.norm(delta))


def clip(problem: Problem) -> list[np.ndarray]:
    """delta min(1, C / |delta|)."""
    return rounds(problem, lambda deltas: [clipped(d, 0.1) for d in deltas])


def clip_quantile(problem: Problem) -> list[np.ndarray]:
    """Andrew et al. 2021, Algorithm 1 without noise: C = C exp(-eta (b - gamma))."""
    largest = 0.3

    def change(deltas: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        nonlocal largest
        found = [clipped(d, largest) for d in deltas]
        b = np.mean([np.linalg.norm(d) <= largest for d in deltas])
        largest = largest * math.exp(-0.7 * (b - 0.4))
        return found

    return rounds(problem, change)


def no_longer(problem: Problem) -> list[np.ndarray]:
    """Reject deltas beyond a norm."""
    return rounds(problem, lambda deltas: [d if np.linalg.norm(d) <= 0.3 else None for d in deltas])


def no_longer_than_the_median(problem: Problem) -> list[np.ndarray]:
    """Reject deltas beyond 1.1 times the median norm of the round before."""
    largest = math.inf

    def change(deltas: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
        nonlocal largest
        norms = [np.linalg.norm(d) for d in deltas]
        found = [d if n <= largest else None for d, n in zip(deltas, norms, strict=True)]
        largest = 1.1 * np.median(norms)
        return found

    return rounds(problem, change)


def noisy(problem: Problem) -> list[np.ndarray]:
    """Noise of 0.5 C on every clipped delta, keyed by round and silo."""
    number = 0

    def change(deltas: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        nonlocal number
        number += 1
        draws = [
            rng.generator(0, purpose="noise 2", round=number, silo=IDS[k]).standard_normal(len(problem.start_P))
            for k in problem.cohorts[number - 1]
        ]
        return [clipped(d, 0.1) + 0.5 * 0.1 * z for d, z in zip(deltas, draws, strict=True)]

    return rounds(problem, change)


def noisy_mean(problem: Problem) -> list[np.ndarray]:
    """McMahan et al. 2018: noise of 0.5 C on the mean, C times the largest share of a silo."""
    number = 0

    def step(w: np.ndarray, mean: np.ndarray, p: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
        nonlocal number
        number += 1
        z = rng.generator(0, purpose="noise 2", round=number).standard_normal(len(w))
        return w + mean + 0.5 * 0.1 * p.max() * z

    return rounds(problem, lambda deltas: [clipped(d, 0.1) for d in deltas], step)


def fednova(problem: Problem) -> list[np.ndarray]:
    """Wang et al. 2020, Algorithm 1, with clipped deltas; p_k and tau_k are unchanged."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        directions, taus = [], []
        for k in cohort:
            y, batches = w, problem.epochs(k, 1)
            for batch in batches:
                y = y - LR * problem.gradient(y, batch)
            taus.append(len(batches))
            directions.append(clipped(y - w, 0.1) / len(batches))
        p = problem.shares(cohort)
        w = w + sum(p * taus) * sum(a * d for a, d in zip(p, directions, strict=True))
        after.append(w)
    return after


def scaffold(problem: Problem, of_changes: float = math.inf) -> list[np.ndarray]:
    """Karimireddy et al. 2020, Algorithm 1, Option II, with clipped deltas; changes of c_k are clipped on request."""
    x, c = problem.start_P, np.zeros_like(problem.start_P)
    own = [np.zeros_like(c) for _ in range(problem.num_silos)]
    after = []
    for cohort in problem.cohorts:
        deltas, changes = [], []
        for k in cohort:
            y = x
            for batch in problem.steps(k, 4):
                y = y - LR * (problem.gradient(y, batch) - own[k] + c)
            new = own[k] - c + (x - y) / (4 * LR)
            changes.append(clipped(new - own[k], of_changes))
            deltas.append(clipped(y - x, 0.1))
            own[k] = new
        x = x + sum(p * d for p, d in zip(problem.shares(cohort), deltas, strict=True))
        c = c + sum(changes) / problem.num_silos
        after.append(x)
    return after


def scaffold_both(problem: Problem) -> list[np.ndarray]:
    return scaffold(problem, 0.1)


def case(wanted: Any, *updates: Any, local: Any = None, select: Any = HALF, **more: Any) -> Case:
    local = local or {"name": "sgd", "steps": 3}
    return Case({"local": local, "select": select, "updates": list(updates), **more}, wanted)


def fedexp(problem: Problem) -> list[np.ndarray]:
    """Jhunjhunwala et al. 2023, Algorithm 1: eta_g = max(1, sum |delta_k|^2 / (2 M (|mean|^2 + eps))).

    The weights p_k replace 1/M.
    """

    def step(w: np.ndarray, mean: np.ndarray, p: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
        eta = sum(a * d @ d for a, d in zip(p, deltas, strict=True)) / (2 * (mean @ mean + 1e-4))
        return w + max(1.0, eta) * mean

    return rounds(problem, lambda deltas: deltas, step)


def fedexp_uniform(problem: Problem) -> list[np.ndarray]:
    """The paper's version, with clipped deltas."""
    problem.n[:] = 1.0

    def step(w: np.ndarray, mean: np.ndarray, p: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
        eta = sum(d @ d for d in deltas) / (2 * len(deltas) * (mean @ mean + 1e-4))
        return w + max(1.0, eta) * mean

    return rounds(problem, lambda deltas: [clipped(d, 0.1) for d in deltas], step)


def exp(wanted: Any = fedexp, *updates: Any, **more: Any) -> Case:
    optimizer = {"name": "fedexp", "eps": 1e-4}
    return case(wanted, *updates, select="all", server={"optimizer": optimizer}, **more)


CLIP = {"name": "clip", "norm": 0.1}
NOISE = {"name": "noise", "sigma": 0.5}
QUANTILE = {"name": "clip", "norm": 0.3, "quantile": 0.4, "lr": 0.7}
SCAFFOLD = {"name": "scaffold", "steps": 4}

CASES = {
    "clip": case(clip, CLIP),
    "clip_silo_by_silo": case(clip, CLIP, exchange={"plan": "sharded", "scope": "silo"}),
    "clip_quantile_window": case(clip_quantile, QUANTILE, exchange={"plan": "window"}),
    "noise_window": case(noisy, CLIP, NOISE, exchange={"plan": "window"}),
    "noise_reproducible": case(noisy, CLIP, NOISE, exchange={"reduction": "reproducible"}),
    "noise_mean_sharded": case(noisy_mean, CLIP, {**NOISE, "where": "mean"}, exchange={"plan": "sharded"}),
    "noise_mean_root": case(noisy_mean, CLIP, {**NOISE, "where": "mean"}, exchange={"plan": "root"}),
    "max_norm": case(no_longer, {"name": "max_norm", "norm": 0.3}, select="all"),
    "max_norm_times": case(no_longer_than_the_median, {"name": "max_norm", "times": 1.1}, select="all"),
    "clip_fednova": case(fednova, CLIP, local={"name": "sgd", "epochs": 1}, aggregate="fednova"),
    **{f"fedexp_{plan}": exp(exchange={"plan": plan}) for plan in ("root", "replicated", "sharded", "window")},
    "fedexp_regions": exp(exchange={"plan": "replicated", "regions": {}}),
    "fedexp_uniform_clipped": exp(fedexp_uniform, CLIP, aggregate={"name": "mean", "weights": "uniform"}),
    "clip_scaffold": case(scaffold, CLIP, local=SCAFFOLD),
    "clip_scaffold_both": case(scaffold_both, {**CLIP, "vectors": ["delta", "control"]}, local=SCAFFOLD),
}
