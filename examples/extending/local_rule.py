"""A local rule: gradient centralization (Yong et al. 2020, equation 1), SGD whose gradients have zero mean.

The base of rules that take gradient steps is `GradientRule` in fedmpi/local/base.py: it has the fields (lr, epochs or
steps, batch_size, optimizer, ...). `local_steps` is the loop over batches; it calls `correct` after each backward pass.

    local: {name: "examples.extending.local_rule:Centralized", lr: 0.1, epochs: 1}
"""

from fedmpi.components import component
from fedmpi.local.base import GradientRule, local_steps


@component
class Centralized(GradientRule):
    """Subtracts from the gradient of each output unit its mean over the inputs."""

    def train(self, silo, model, params_P, round):
        weights = [p for p in model.module.parameters() if p.requires_grad and p.dim() > 1]

        def correct():
            for weight in weights:
                if weight.grad is not None:
                    inputs = tuple(range(1, weight.dim()))
                    weight.grad.sub_(weight.grad.mean(dim=inputs, keepdim=True))

        return local_steps(self, silo, model, params_P, round, correct)
