"""A model, a loss and a metric for survival analysis. Targets [N, 2] are time and event (1, or 0 if censored)."""

import torch
from torch import Tensor, nn


class LogHazard(nn.Module):
    """One number per patient, the logarithm of the relative hazard: [N, inputs] -> [N]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


def cox_loss(log_hazards_N: Tensor, targets: Tensor) -> Tensor:
    """Negative log partial likelihood per event (Cox 1972), with Breslow's method for ties; 0 without events."""
    times_N, events_N = targets.unbind(1)
    at_risk = times_N[None, :] >= times_N[:, None]  # row i: patients at risk at the time of patient i
    log_risk_N = torch.where(at_risk, log_hazards_N[None, :], -torch.inf).logsumexp(1)
    return ((log_risk_N - log_hazards_N) * events_N).sum() / events_N.sum().clamp(min=1)


def c_index(log_hazards_N: Tensor, targets: Tensor) -> Tensor:
    """Share of comparable pairs in which the earlier event has the larger hazard (Harrell et al. 1982).

    A pair is comparable if its earlier time is an event. Equal hazards count one half.
    """
    times_N, events_N = targets.unbind(1)
    comparable = (times_N[:, None] < times_N[None, :]) & (events_N[:, None] == 1)
    ahead = log_hazards_N[:, None] - log_hazards_N[None, :]
    return ((ahead > 0).float() + 0.5 * (ahead == 0).float())[comparable].mean()
