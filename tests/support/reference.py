"""Federated averaging in plain numpy, float64: the reference for the fast path. Does not import fedmpi.

    w_P = train(w_P, silos, rounds=15, local_lr=0.01, gradient=binary_gradient)[-1]

P parameters, K silos. A silo is (n_k, batches): its number of training samples, and a function from the round (1, 2,
...) to the batches (x, y) of that round.
"""

import numpy as np


def binary_gradient(w_P, x, y):
    """Gradient of the mean binary cross-entropy of a linear model [P]: weights, then bias."""
    error = 1 / (1 + np.exp(-(x @ w_P[:-1] + w_P[-1]))) - y
    return np.append(x.T @ error, error.sum()) / len(x)


def softmax_gradient(w_P, x, y):
    """Gradient of the mean cross-entropy of a linear model [P]: weights [classes, inputs] by row, then biases
    [classes]."""
    inputs = x.shape[1]
    classes = len(w_P) // (inputs + 1)
    logits = x @ w_P[: classes * inputs].reshape(classes, inputs).T + w_P[classes * inputs :]
    error = np.exp(logits - logits.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    return np.append((error.T @ x).ravel(), error.sum(0)) / len(x)


def square_gradient(w_P, x, y):
    """Gradient of the mean squared error of a linear model [P]: weights, then bias."""
    error = x @ w_P[:-1] + w_P[-1] - y
    return 2 * np.append(x.T @ error, error.sum()) / len(x)


def local_sgd(w_P, batches, lr, gradient):
    """A silo's parameters after one pass over its batches."""
    for x, y in batches:
        w_P = w_P - lr * gradient(w_P, np.asarray(x, np.float64), np.asarray(y))
    return w_P


def mean_delta(w_P, locals_KP, n_K):
    """sum n_k/n (w_k - w)."""
    return sum(n_k / sum(n_K) * (w_k - w_P) for n_k, w_k in zip(n_K, locals_KP, strict=True))


def start(w_P, v0=0.0):
    """m and v before the first round."""
    return np.zeros_like(w_P), np.full_like(w_P, v0)


def fedavg(w, delta, m, v, lr=1.0):
    return w + lr * delta, m, v


def fedavgm(w, delta, m, v, lr=1.0, beta=0.9, nesterov=False):
    v = beta * v + delta
    return w + lr * (delta + beta * v if nesterov else v), m, v


def fedgm(w, delta, m, v, lr=1.0, beta=0.9, gamma=1.0):
    m = beta * m + (1 - beta) * delta
    return w + lr * (delta + gamma * m), m, v


def fedadagrad(w, delta, m, v, lr, beta1, tau):
    m = beta1 * m + (1 - beta1) * delta
    v = v + delta**2
    return w + lr * m / (np.sqrt(v) + tau), m, v


def fedadam(w, delta, m, v, lr, beta1, beta2, tau):
    m = beta1 * m + (1 - beta1) * delta
    v = beta2 * v + (1 - beta2) * delta**2
    return w + lr * m / (np.sqrt(v) + tau), m, v


def fedyogi(w, delta, m, v, lr, beta1, beta2, tau):
    m = beta1 * m + (1 - beta1) * delta
    v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
    return w + lr * m / (np.sqrt(v) + tau), m, v


def fedexp(w, delta, m, v, squares=0.0, eps=1e-3):
    eta = squares / (2 * (float(delta @ delta) + eps))
    return w + max(1.0, eta) * delta, m, v


def feddyn(w, delta, m, v, alpha, fraction=1.0):
    m = m - alpha * fraction * delta
    return w + delta - m / alpha, m, v


SERVERS = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedgm": fedgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "feddyn": feddyn,
    "fedexp": fedexp,
}


def train(w_P, silos, rounds, local_lr, gradient, server="fedavg", v0=0.0, **options):
    """The global parameters after every round; all silos take part in each. `options` go to the server optimizer."""
    w_P = np.asarray(w_P, np.float64)
    m, v = start(w_P, v0)
    after = []
    for number in range(1, rounds + 1):
        locals_KP = [local_sgd(w_P, batches(number), local_lr, gradient) for _, batches in silos]
        delta_P = mean_delta(w_P, locals_KP, [n_k for n_k, _ in silos])
        w_P, m, v = SERVERS[server](w_P, delta_P, m, v, **options)
        after.append(w_P)
    return after
