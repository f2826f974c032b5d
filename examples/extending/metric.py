"""A metric: the Brier score, the mean squared distance between predicted probabilities and the true class.

A metric with a state has `init`, `update` and `compute`, and `maximize`. States are added up over batches and silos, so
the metric of all silos is that of the pooled test samples. A function `f(outputs, targets)` works too, but then only
its mean over silos is known.

    objective: {metrics: [accuracy, {name: "examples.extending.metric:Brier"}]}
"""

import torch
import torch.nn.functional as F


class Brier:
    """Lower is better; 0 for correct predictions with probability 1."""

    maximize = False

    def init(self):
        return torch.zeros(2, dtype=torch.float64)  # sum of squared distances, samples

    def update(self, state, outputs, targets):
        truth = F.one_hot(targets, outputs.shape[1])
        distance = (outputs.softmax(1) - truth).square().sum()
        return state + torch.stack([distance.double(), torch.tensor(len(targets), dtype=torch.float64)])

    def compute(self, state):
        return state[0] / state[1]
