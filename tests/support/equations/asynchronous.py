"""Asynchronous rounds in virtual time: FedAsync and FedBuff with their staleness weights."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from support.equations import IDS, ROUNDS, SIZES, Case, Problem

LR = 0.05
SECONDS = {"a": 1.0, "b": 1.3, "c": 2.9, "d": 0.7, "e": 3.1}  # of one training
SLOWEST_LAST = {**SECONDS, "e": 4.6}


def constant(x: int) -> float:
    return 1.0


def polynomial(x: int) -> float:
    """Xie et al. 2019, section 5.2, with a = 0.5; as in FedBuff, section 5."""
    return 1 / math.sqrt(1 + x)


def hinge(x: int) -> float:
    """Xie et al. 2019, section 5.2, with a = 2 and b = 1."""
    return 1.0 if x <= 1 else 1 / (2 * (x - 1) + 1)


def inverse(x: int) -> float:
    return 1 / (1 + 0.5 * x)


def trained(problem: Problem, w: np.ndarray, k: int) -> np.ndarray:
    """The delta of three steps from w."""
    y = w
    for batch in problem.steps(k, 3):
        y = y - LR * problem.gradient(y, batch)
    return y - w


def fedasync(s: Callable[[int], float], alpha: float) -> Callable[[Problem], list[np.ndarray]]:
    """Each update as it arrives: w + alpha s(t - tau) (w_k - w_tau)."""

    def wanted(problem: Problem) -> list[np.ndarray]:
        ends = {k: SECONDS[silo] for k, silo in enumerate(IDS)}
        versions, tau = [problem.start_P], dict.fromkeys(ends, 0)
        for t in range(ROUNDS):
            k = min(ends, key=lambda k: (ends[k], k))
            delta = trained(problem, versions[tau[k]], k)
            versions.append(versions[t] + alpha * s(t - tau[k]) * delta)
            tau[k], ends[k] = t + 1, ends[k] + SECONDS[IDS[k]]
        return versions[1:]

    return wanted


def fedbuff(
    s: Callable[[int], float],
    size: int,
    server: Callable[[], Callable[[np.ndarray, np.ndarray], np.ndarray]],
    uniform: bool = True,
    most: int = 10**9,
    window: float = 0.0,
    seconds: dict[str, float] = SECONDS,
    combined: Callable[[], Callable[[np.ndarray], np.ndarray]] | None = None,
) -> Callable[[Problem], list[np.ndarray]]:
    """Nguyen et al. 2022, Algorithm 1: `size` updates go into the buffer, then the server steps by their mean, or by
    what a robust rule makes of them, each multiplied by its staleness weight."""

    def wanted(problem: Problem) -> list[np.ndarray]:
        step, rule = server(), combined() if combined is not None else None
        ends = {k: seconds[silo] for k, silo in enumerate(IDS)}
        w, versions, tau, t = problem.start_P, [problem.start_P], dict.fromkeys(ends, 0), 0
        buffer: list[tuple[float, np.ndarray]] = []
        waits: list[int] = []
        closes = math.inf
        while t < ROUNDS:
            k = min(ends, key=lambda k: (ends[k], k))
            now = ends[k]
            if len(buffer) >= size and not (window and now <= closes):
                total = sum(p for p, _ in buffer)
                rows = np.array([d for _, d in buffer])
                w = step(w, sum(p / total * d for p, d in buffer) if rule is None else rule(rows))
                t, buffer = t + 1, []
                versions.append(w)
                for other in waits:
                    tau[other], ends[other] = t, closes + seconds[IDS[other]]
                waits, closes = [], math.inf
                continue
            if t - tau[k] > most:  # too old: it does not count, and its silo takes up its data again where it was
                tau[k], ends[k] = t, now + seconds[IDS[k]]
                continue
            p = 1.0 if uniform else float(SIZES[k])
            buffer.append((p, s(t - tau[k]) * trained(problem, versions[tau[k]], k)))
            if len(buffer) == size:
                closes = now + window
            if len(buffer) >= size:
                waits.append(k)
                ends[k] = math.inf
            else:
                tau[k], ends[k] = t, now + seconds[IDS[k]]
        return versions[1:]

    return wanted


def scaffold(s: Callable[[int], float], size: int) -> Callable[[Problem], list[np.ndarray]]:
    """SCAFFOLD (Karimireddy et al. 2020, Algorithm 1, Option II) in FedBuff's order of arrivals. The server's c is the
    mean of the control variates that the silos have sent so far: its changes have no staleness weight."""

    def wanted(problem: Problem) -> list[np.ndarray]:
        ends = {k: SECONDS[silo] for k, silo in enumerate(IDS)}
        x, c = problem.start_P, np.zeros_like(problem.start_P)
        own = [np.zeros_like(c) for _ in IDS]
        versions, tau = [(x, c)], dict.fromkeys(ends, 0)
        for t in range(ROUNDS):
            buffer, last = [], 0
            for number in range(size):
                k = last = min(ends, key=lambda k: (ends[k], k))
                start, control = versions[tau[k]]
                y = start
                for batch in problem.steps(k, 3):
                    y = y - LR * (problem.gradient(y, batch) - own[k] + control)
                new = own[k] - control + (start - y) / (3 * LR)
                buffer.append((s(t - tau[k]) * (y - start), new - own[k]))
                own[k] = new
                if number < size - 1:
                    tau[k], ends[k] = t, ends[k] + SECONDS[IDS[k]]
            x = x + 0.8 * sum(delta for delta, _ in buffer) / size
            c = c + sum(change for _, change in buffer) / len(IDS)
            versions.append((x, c))
            tau[last], ends[last] = t + 1, ends[last] + SECONDS[IDS[last]]
        assert all(np.allclose(c, np.mean(own, axis=0)) for _ in own)
        return [x for x, _ in versions[1:]]

    return wanted


def median() -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: np.median(rows, axis=0)


def krum() -> Callable[[np.ndarray], np.ndarray]:
    """Blanchard et al. 2017, section 3, with five updates and f = 1: the sum of the two nearest."""

    def rule(rows: np.ndarray) -> np.ndarray:
        apart = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
        np.fill_diagonal(apart, np.inf)
        return rows[np.sort(apart, axis=1)[:, :2].sum(axis=1).argmin()]

    return rule


def clipped_around_the_last() -> Callable[[np.ndarray], np.ndarray]:
    """Karimireddy et al. 2021, Learning from History, section 4, one step, tau 0.05."""
    v: np.ndarray | float = 0.0

    def rule(rows: np.ndarray) -> np.ndarray:
        nonlocal v
        moves = rows - v
        norms = np.linalg.norm(moves, axis=1, keepdims=True)
        v = v + (moves * np.minimum(1, 0.05 / norms)).mean(axis=0)
        return np.asarray(v)

    return rule


def average() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda w, mean: w + 0.8 * mean


def momentum() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    v = 0.0

    def step(w: np.ndarray, mean: np.ndarray) -> np.ndarray:
        nonlocal v
        v = 0.6 * v + mean
        return w + 0.5 * v

    return step


def case(
    wanted: Callable[[Problem], list[np.ndarray]],
    staleness: Any,
    optimizer: Any = None,
    seconds: dict[str, float] = SECONDS,
    weights: str = "uniform",
    aggregate: Any = None,
    local: Any = None,
    **engine: Any,
) -> Case:
    clock = {"name": "virtual", "slower": seconds}
    return Case(
        {
            "local": local or {"name": "sgd", "steps": 3},
            "aggregate": aggregate or {"name": "mean", "weights": weights},
            "server": {"optimizer": optimizer or {"name": "fedavg", "lr": 0.8}},
            "engine": {"name": "buffered", "staleness": staleness, "clock": clock, **engine},
        },
        wanted,
    )


POLYNOMIAL = {"name": "polynomial", "a": 0.5}
MOMENTUM = {"name": "fedavgm", "lr": 0.5, "beta": 0.6}

CASES = {
    "fedasync_constant": case(fedasync(constant, 0.8), "constant"),
    "fedasync_hinge": case(fedasync(hinge, 0.8), {"name": "hinge", "a": 2.0, "b": 1.0}),
    "fedasync_polynomial": case(fedasync(polynomial, 0.8), POLYNOMIAL),
    "fedasync_inverse": case(fedasync(inverse, 0.8), {"name": "inverse", "beta": 0.5}),
    "fedbuff": case(fedbuff(polynomial, 3, average), POLYNOMIAL, size=3),
    "fedbuff_momentum": case(fedbuff(polynomial, 2, momentum), POLYNOMIAL, MOMENTUM, size=2),
    "fedbuff_samples": case(fedbuff(polynomial, 3, average, uniform=False), POLYNOMIAL, weights="samples", size=3),
    "fedbuff_window": case(
        fedbuff(hinge, 2, average, window=0.5), {"name": "hinge", "a": 2.0, "b": 1.0}, size=2, window_s=0.5
    ),
    "fedbuff_max_staleness": case(
        fedbuff(constant, 2, average, most=1, seconds=SLOWEST_LAST),
        "constant",
        seconds=SLOWEST_LAST,
        size=2,
        max_staleness=1,
    ),
    "fedbuff_median": case(fedbuff(polynomial, 3, average, combined=median), POLYNOMIAL, size=3, aggregate="median"),
    "fedbuff_krum": case(
        fedbuff(polynomial, 5, momentum, combined=krum),
        POLYNOMIAL,
        MOMENTUM,
        size=5,
        aggregate={"name": "krum", "hostile": 1},
    ),
    "fedbuff_clipped": case(
        fedbuff(hinge, 3, average, combined=clipped_around_the_last),
        {"name": "hinge", "a": 2.0, "b": 1.0},
        size=3,
        aggregate={"name": "centered_clipping", "tau": 0.05},
    ),
    "async_scaffold": case(scaffold(polynomial, 1), POLYNOMIAL, local={"name": "scaffold", "steps": 3}),
    "buffered_scaffold": case(scaffold(polynomial, 3), POLYNOMIAL, size=3, local={"name": "scaffold", "steps": 3}),
    "fedasync_momentum": case(fedbuff(constant, 1, momentum), "constant", MOMENTUM),
}
