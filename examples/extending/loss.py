"""A loss with arguments: the focal loss of Lin et al. 2017, equation 4, which lowers the weight of easy samples.

A class whose objects are called with outputs and targets, and return a scalar; its arguments stand beside its name. In
training it gets batches; to score a test set it gets all outputs and targets of one silo, on the CPU.

    objective: {loss: {name: "examples.extending.loss:Focal", gamma: 2}}
"""

import torch.nn.functional as F


class Focal:
    """mean of -(1 - p)^gamma log p, where p is the probability of the true class; gamma 0 is cross entropy."""

    def __init__(self, gamma=2.0):
        self.gamma = gamma

    def __call__(self, outputs, targets):
        terms = F.cross_entropy(outputs, targets, reduction="none")
        return ((1 - (-terms).exp()) ** self.gamma * terms).mean()
