"""Robust aggregators on whole vectors, in float64, as in their papers: x [K, P] to one vector [P]."""

import numpy as np


def squared(a, b):
    return float(((a - b) ** 2).sum())


def krum_scores(x, f):
    """Blanchard et al. 2017: s(i) = sum over the K - f - 2 vectors nearest to x_i of |x_i - x_j|^2."""
    scores = []
    for i, a in enumerate(x):
        others = sorted(squared(a, b) for j, b in enumerate(x) if j != i)
        scores.append(sum(others[: max(1, len(x) - f - 2)]))
    return scores


def krum(x, hostile):
    return x[int(np.argmin(krum_scores(x, hostile)))]


def multi_krum(x, hostile, m=None):
    best = sorted(range(len(x)), key=krum_scores(x, hostile).__getitem__)
    return x[best[: m or len(x) - hostile]].mean(0)


def bulyan(x, hostile):
    """El Mhamdi et al. 2018: theta = K - 2 f vectors by repeated Krum, then the theta - 2 f nearest the median."""
    left, chosen = [*x], []
    while len(chosen) < len(x) - 2 * hostile:
        chosen.append(left.pop(int(np.argmin(krum_scores(left, hostile)))))
    beta, result = len(chosen) - 2 * hostile, np.empty(x.shape[1])
    for i, column in enumerate(np.array(chosen).T):
        result[i] = column[np.argsort(np.abs(column - np.median(column)))[:beta]].mean()
    return result


def geometric_median(x, hostile=0, iterations=100, smoothing=1e-6):
    """Pillutla et al. 2022, Algorithm 2, from 0."""
    v = np.zeros(x.shape[1])
    for _ in range(iterations):
        beta = [1 / max(smoothing, squared(a, v) ** 0.5) for a in x]
        v = sum(b * a for b, a in zip(beta, x, strict=True)) / sum(beta)
    return v


def centered_clipping(x, hostile=0, tau=10.0, iterations=1, centre=0.0):
    """Karimireddy et al. 2021: v + 1/K sum (x_k - v) min(1, tau/|x_k - v|)."""
    v = np.zeros(x.shape[1]) + centre
    for _ in range(iterations):
        v = v + np.mean([(a - v) * min(1.0, tau / max(squared(a, v) ** 0.5, 1e-300)) for a in x], axis=0)
    return v


def norm_bound(x, hostile=0, norm=1.0):
    return np.mean([a * min(1.0, norm / np.linalg.norm(a)) for a in x], axis=0)


def median(x):
    return np.median(x, axis=0)


def trimmed_mean(x, fraction):
    out = int(fraction * len(x) + 1e-9)
    return np.sort(x, axis=0)[out : len(x) - out].mean(0)


def sign_vote(x, hostile=0):
    return np.sign(np.sign(x).sum(0))


def buckets(x, size, order):
    """Karimireddy et al. 2022, Algorithm 1, for a given permutation."""
    return np.array([x[part].mean(0) for part in np.split(order, range(size, len(order), size))])


def nearest_mixed(x, hostile):
    """Allouah et al. 2023, Algorithm 2: each vector becomes the mean of its K - f nearest ones."""
    rows = []
    for a in x:
        near = sorted(range(len(x)), key=lambda j, a=a: squared(a, x[j]))
        rows.append(x[near[: len(x) - hostile]].mean(0))
    return np.array(rows)
