"""Local rules besides FedAvg, FedProx and SCAFFOLD's Option II, their variants with optimizers, and FedNova's |a|_1."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from support.equations import HALF, INPUTS, Case, Problem

LR = 0.05
STEPS = 4
RHO = 0.8


def averaged(problem: Problem, local: Callable[[int, np.ndarray], np.ndarray], lr: float = 1.0) -> list[np.ndarray]:
    """Rounds of averaging by samples; `local` maps (silo, parameters) to its result, `lr` is the server's step."""
    w, after = problem.start_P, []
    for cohort in problem.cohorts:
        ends = [local(k, w) for k in cohort]
        w = (1 - lr) * w + lr * sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        after.append(w)
    return after


def fedsgd(problem: Problem) -> list[np.ndarray]:
    """McMahan et al. 2017, section 2: one step on all samples."""
    return averaged(problem, lambda k, w: w - LR * problem.gradient(w, problem.whole(k)))


def fedsgd_clipped(problem: Problem) -> list[np.ndarray]:
    def local(k: int, w: np.ndarray) -> np.ndarray:
        g = problem.gradient(w, problem.whole(k))
        return w - LR * g * min(1.0, 0.5 / (np.linalg.norm(g) + 1e-6))

    return averaged(problem, local)


def fedprox_adaptive(problem: Problem) -> list[np.ndarray]:
    """Li et al. 2020, Algorithm 2 and section 5.3: each silo's mu follows its own loss."""
    mu, falls = [0.25] * problem.num_silos, [0] * problem.num_silos
    last: list[float | None] = [None] * problem.num_silos
    changed = set()

    def local(k: int, w: np.ndarray) -> np.ndarray:
        y, total, count = w, 0.0, 0
        for x, targets in problem.steps(k, STEPS):
            total += float(np.sum((x @ y[:-1] + y[-1] - targets) ** 2))
            count += len(x)
            y = y - LR * (problem.gradient(y, (x, targets)) + mu[k] * (y - w))
        loss = total / count
        if last[k] is not None and loss > last[k]:
            mu[k], falls[k] = mu[k] + 0.1, 0
            changed.add(k)
        elif last[k] is not None and loss < last[k]:
            falls[k] += 1
            if falls[k] == 5:
                mu[k], falls[k] = max(0.0, mu[k] - 0.1), 0
        last[k] = loss
        return y

    after = averaged(problem, local)
    assert changed, "no loss has risen"
    return after


def scaffold_1(problem: Problem) -> list[np.ndarray]:
    """Karimireddy et al. 2020, Algorithm 1, Option I."""
    x, c = problem.start_P, np.zeros_like(problem.start_P)
    own = [np.zeros_like(c) for _ in range(problem.num_silos)]
    after = []
    for cohort in problem.cohorts:
        ends, change = [], np.zeros_like(c)
        for k in cohort:
            y = x
            for batch in problem.steps(k, STEPS):
                y = y - LR * (problem.gradient(y, batch) - own[k] + c)
            new = problem.gradient(x, problem.whole(k))
            change = change + new - own[k]
            ends.append(y)
            own[k] = new
        x = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        c = c + change / problem.num_silos
        after.append(x)
    return after


def sum_of_a(rho: float, tau: int) -> float:
    """|a|_1 of momentum, Wang et al. 2020, section 4: a_i = (1 - rho^(tau - i)) / (1 - rho)."""
    return sum((1 - rho ** (tau - i)) / (1 - rho) for i in range(tau))


def scaffold_momentum(problem: Problem) -> list[np.ndarray]:
    """Option II with momentum steps: the control variate is the mean of gradients weighted by a_i."""
    x, c = problem.start_P, np.zeros_like(problem.start_P)
    own = [np.zeros_like(c) for _ in range(problem.num_silos)]
    after = []
    for cohort in problem.cohorts:
        ends, change = [], np.zeros_like(c)
        for k in cohort:
            y, buffer = x, 0.0
            for batch in problem.steps(k, STEPS):
                buffer = RHO * buffer + problem.gradient(y, batch) - own[k] + c
                y = y - LR * buffer
            new = own[k] - c + (x - y) / (LR * sum_of_a(RHO, STEPS))
            change = change + new - own[k]
            ends.append(y)
            own[k] = new
        x = sum(p * y for p, y in zip(problem.shares(cohort), ends, strict=True))
        c = c + change / problem.num_silos
        after.append(x)
    return after


def scaffold_benchmark(problem: Problem, server_lr: float) -> list[np.ndarray]:
    """FLamby's version: before the round, c_k grows by the distance of the silo's last state from the server.

    The silo's state is `server_lr` of the way to its last parameters.
    """
    own, state = {}, {}

    def local(k: int, w: np.ndarray) -> np.ndarray:
        if k in state:
            own[k] = own.get(k, 0.0) + (w - state[k]) / (server_lr * LR * STEPS)
        y = w
        for batch in problem.steps(k, STEPS):
            y = y - LR * (problem.gradient(y, batch) - own.get(k, 0.0))
        state[k] = server_lr * y + (1 - server_lr) * w
        return y

    return averaged(problem, local, server_lr)


def feddyn(problem: Problem, uniform: bool) -> list[np.ndarray]:
    """Acar et al. 2021, Algorithm 1; weighted by samples, K p_k replaces 1."""
    alpha, w = 0.3, problem.start_P
    h, own, after = np.zeros_like(w), [np.zeros_like(w) for _ in range(problem.num_silos)], []
    p = np.full(problem.num_silos, 1 / problem.num_silos) if uniform else problem.n / problem.n.sum()
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            y = w
            for batch in problem.steps(k, STEPS):
                y = y - LR * (problem.gradient(y, batch) - own[k] + alpha * (y - w))
            own[k] = own[k] - alpha * (y - w)
            ends.append(y)
        h = h - alpha * sum(p[k] * (y - w) for k, y in zip(cohort, ends, strict=True))
        w = sum(p[k] * y for k, y in zip(cohort, ends, strict=True)) / sum(p[k] for k in cohort) - h / alpha
        after.append(w)
    return after


def gradient_correction(problem: Problem) -> list[np.ndarray]:
    """g + 0.5 (last round's mean gradient - the silo's own last one)."""
    w, everybodys, own, after = problem.start_P, None, {}, []
    for cohort in problem.cohorts:
        ends, means = [], []
        for k in cohort:
            by = 0.5 * (everybodys - own[k]) if k in own else 0.0
            y, seen = w, []
            for batch in problem.steps(k, STEPS):
                seen.append(problem.gradient(y, batch))
                y = y - LR * (seen[-1] + by)
            own[k] = np.mean(seen, axis=0)
            means.append(own[k])
            ends.append(y)
        shares = problem.shares(cohort)
        w = sum(p * y for p, y in zip(shares, ends, strict=True))
        everybodys = sum(p * g for p, g in zip(shares, means, strict=True))
        after.append(w)
    return after


def mime_lite(problem: Problem) -> list[np.ndarray]:
    """Karimireddy et al. 2021, Algorithm 1, MimeLite with SGDm, beta 0.7."""
    x, m, after = problem.start_P, np.zeros_like(problem.start_P), []
    for cohort in problem.cohorts:
        ends = []
        for k in cohort:
            y = x
            for batch in problem.steps(k, STEPS):
                y = y - LR * (0.3 * problem.gradient(y, batch) + 0.7 * m)
            ends.append(y)
        shares = problem.shares(cohort)
        m = 0.3 * sum(p * problem.gradient(x, problem.whole(k)) for p, k in zip(shares, cohort, strict=True)) + 0.7 * m
        x = sum(p * y for p, y in zip(shares, ends, strict=True))
        after.append(x)
    return after


def normalised(problem: Problem, local: Callable[[int, np.ndarray], tuple[np.ndarray, float]]) -> Iterator[np.ndarray]:
    """Wang et al. 2020, Algorithm 1; `local` returns a silo's last parameters and its |a_k|_1."""
    w = problem.start_P
    for cohort in problem.cohorts:
        p = problem.shares(cohort)
        ends, sums = zip(*(local(k, w) for k in cohort), strict=True)
        tau_eff = sum(p * sums)
        w = w - tau_eff * sum(share * (w - y) / a for share, y, a in zip(p, ends, sums, strict=True))
        yield w


def fednova_momentum(problem: Problem, nesterov: bool = False) -> list[np.ndarray]:
    """|a_k|_1 = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho); Nesterov's is one power of rho ahead."""

    def local(k: int, w: np.ndarray) -> tuple[np.ndarray, float]:
        y, buffer, batches = w, 0.0, problem.epochs(k, 1)
        for batch in batches:
            g = problem.gradient(y, batch)
            buffer = RHO * buffer + g
            y = y - LR * (g + RHO * buffer if nesterov else buffer)
        tau = len(batches)
        a = (tau - RHO * (1 - RHO**tau) / (1 - RHO)) / (1 - RHO)
        return y, tau + RHO * a if nesterov else a

    return list(normalised(problem, local))


def fednova_prox(problem: Problem) -> list[np.ndarray]:
    """|a_k|_1 = (1 - (1 - lr mu)^tau) / (lr mu)."""

    def local(k: int, w: np.ndarray) -> tuple[np.ndarray, float]:
        y, batches = w, problem.epochs(k, 1)
        for batch in batches:
            y = y - LR * (problem.gradient(y, batch) + 2.0 * (y - w))
        alpha = LR * 2.0
        return y, (1 - (1 - alpha) ** len(batches)) / alpha

    return list(normalised(problem, local))


def fednova_mime_lite(problem: Problem) -> list[np.ndarray]:
    """MimeLite under FedNova: the momentum averages gradients by samples, for any number of steps."""
    m, found, after = np.zeros_like(problem.start_P), {}, []

    def local(k: int, w: np.ndarray) -> tuple[np.ndarray, float]:
        y, batches = w, problem.epochs(k, 1)
        for batch in batches:
            y = y - LR * (0.3 * problem.gradient(y, batch) + 0.7 * m)
        found[k] = problem.gradient(w, problem.whole(k))
        return y, len(batches)

    for w in normalised(problem, local):
        cohort = list(found)
        m = 0.3 * sum(p * found[k] for p, k in zip(problem.shares(cohort), cohort, strict=True)) + 0.7 * m
        found.clear()
        after.append(w)
    return after


def fednova_corrected(problem: Problem) -> list[np.ndarray]:
    """Gradient correction under FedNova: g' is the mean by samples."""
    everybodys, own, means, after = np.zeros_like(problem.start_P), {}, {}, []

    def local(k: int, w: np.ndarray) -> tuple[np.ndarray, float]:
        y, batches, seen = w, problem.epochs(k, 1), []
        for batch in batches:
            seen.append(problem.gradient(y, batch))
            y = y - LR * (seen[-1] + (0.5 * (everybodys - own[k]) if k in own else 0.0))
        own[k] = means[k] = np.mean(seen, axis=0)
        return y, len(batches)

    for w in normalised(problem, local):
        cohort = list(means)
        everybodys = sum(p * means[k] for p, k in zip(problem.shares(cohort), cohort, strict=True))
        means.clear()
        after.append(w)
    return after


def ema(problem: Problem) -> list[np.ndarray]:
    """m = beta m + (1 - beta) g, from 0 in every round."""

    def local(k: int, w: np.ndarray) -> np.ndarray:
        y, m = w, np.zeros_like(w)
        for batch in problem.steps(k, STEPS):
            m = RHO * m + (1 - RHO) * problem.gradient(y, batch)
            y = y - LR * m
        return y

    return averaged(problem, local)


def kept_momentum(problem: Problem) -> list[np.ndarray]:
    """The silo keeps its momentum buffer between rounds."""
    buffers: dict[int, Any] = {}

    def local(k: int, w: np.ndarray) -> np.ndarray:
        y = w
        for batch in problem.steps(k, STEPS):
            buffers[k] = RHO * buffers.get(k, 0.0) + problem.gradient(y, batch)
            y = y - LR * buffers[k]
        return y

    return averaged(problem, local)


def kept_adam(problem: Problem) -> list[np.ndarray]:
    """Adam (Kingma and Ba 2015, Algorithm 1); moments and step count continue between rounds."""
    kept: dict[int, Any] = {}

    def local(k: int, w: np.ndarray) -> np.ndarray:
        y, (m, v, t) = w, kept.get(k, (0.0, 0.0, 0))
        for batch in problem.steps(k, STEPS):
            g, t = problem.gradient(y, batch), t + 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            y = y - LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        kept[k] = m, v, t
        return y

    return averaged(problem, local)


def cyclic(problem: Problem) -> list[np.ndarray]:
    """Chang et al. 2018, cyclic weight transfer: each silo continues from the last silo's parameters."""
    w, after = problem.start_P, []
    for number, cohort in enumerate(problem.cohorts):
        assert list(cohort) == [number % problem.num_silos]
        for batch in problem.epochs(number % problem.num_silos, 1):
            w = w - LR * problem.gradient(w, batch)
        after.append(w)
    return after


def moon(problem: Problem) -> list[np.ndarray]:
    """Li et al. 2021, Algorithm 1, on two layers; torch computes the gradient from equations 3 to 5 as printed."""
    last: dict[int, torch.Tensor] = {}

    def hidden(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w[: 4 * INPUTS].view(4, INPUTS).T + w[4 * INPUTS : 4 * INPUTS + 4])

    def sim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())

    def local(k: int, start: np.ndarray) -> np.ndarray:
        w = y = torch.from_numpy(start)
        for batch in problem.steps(k, STEPS):
            x, targets = map(torch.from_numpy, batch)
            y = y.detach().requires_grad_()
            z = hidden(y, x)
            loss = (z @ y[-5:-1] + y[-1] - targets).square().mean()
            if k in last:
                same, other = ((sim(z, hidden(v, x)) / 0.5).exp() for v in (w, last[k]))
                loss = loss + 3.0 * -(same / (same + other)).log().mean()
            y = y.detach() - LR * torch.autograd.grad(loss, y)[0]
        last[k] = y
        return y.numpy()

    return averaged(problem, local)


def steps(name: str, **more: Any) -> dict[str, Any]:
    return {"local": {"name": name, "steps": STEPS, **more}, "select": HALF}


def epoch(name: str, **more: Any) -> dict[str, Any]:
    return {"local": {"name": name, "epochs": 1, **more}, "select": HALF, "aggregate": "fednova"}


MOMENTUM = {"name": "SGD", "momentum": RHO}
NESTEROV = {**MOMENTUM, "nesterov": True}
FEDDYN = {**steps("feddyn", alpha=0.3), "server": {"optimizer": {"name": "feddyn", "alpha": 0.3}}}
SHARDED = {"exchange": {"plan": "sharded"}}

CASES = {
    "fedsgd": Case({"local": {"name": "fedsgd", "batch_size": None}, "select": HALF}, fedsgd),
    "fedsgd_in_parts": Case({"local": {"name": "fedsgd"}, "select": HALF}, fedsgd),
    "fedsgd_clipped": Case({"local": {"name": "fedsgd", "clip": 0.5}, "select": HALF}, fedsgd_clipped),
    "fedprox_adaptive": Case(steps("fedprox", mu=0.25, adaptive=True), fedprox_adaptive),
    "scaffold_1": Case(steps("scaffold", option="I"), scaffold_1),
    "scaffold_momentum": Case(steps("scaffold", optimizer=MOMENTUM), scaffold_momentum),
    "scaffold_benchmark": Case(steps("scaffold", variant="benchmark"), lambda p: scaffold_benchmark(p, 1.0)),
    "scaffold_benchmark_slowly": Case(
        {
            **steps("scaffold", variant="benchmark", server_lr=0.5),
            "server": {"optimizer": {"name": "fedavg", "lr": 0.5}},
        },
        lambda p: scaffold_benchmark(p, 0.5),
    ),
    "feddyn": Case({**FEDDYN, "aggregate": {"name": "mean", "weights": "uniform"}}, lambda p: feddyn(p, True)),
    "feddyn_samples": Case({**FEDDYN, **SHARDED}, lambda p: feddyn(p, False)),
    "feddyn_root": Case({**FEDDYN, "exchange": {"plan": "root"}}, lambda p: feddyn(p, False)),
    "gradient_correction": Case(steps("gradient_correction", alpha=0.5), gradient_correction),
    "mime_lite": Case(steps("mime_lite", beta=0.7), mime_lite),
    "mime_lite_sharded": Case({**steps("mime_lite", beta=0.7), **SHARDED}, mime_lite),
    "fednova_momentum": Case(epoch("sgd", optimizer=MOMENTUM), fednova_momentum),
    "fednova_nesterov": Case(epoch("sgd", optimizer=NESTEROV), lambda p: fednova_momentum(p, nesterov=True)),
    "fednova_mime_lite": Case(epoch("mime_lite", beta=0.7), fednova_mime_lite),
    "fednova_corrected": Case(epoch("gradient_correction", alpha=0.5), fednova_corrected),
    "fednova_prox": Case(epoch("fedprox", mu=2.0), fednova_prox),
    "ema": Case(steps("sgd", optimizer={"name": "EmaSGD", "beta": RHO}), ema),
    "kept_momentum": Case(steps("sgd", optimizer=MOMENTUM, keep_optimizer=True), kept_momentum),
    "kept_adam": Case(steps("sgd", optimizer="Adam", keep_optimizer=True), kept_adam, 1e-8),
    "cyclic": Case({"local": {"name": "sgd", "epochs": 1}, "select": "support.equations:OneByOne"}, cyclic),
    "moon": Case({**steps("moon", mu=3.0), "model": "support.equations:two_layers"}, moon),
}
