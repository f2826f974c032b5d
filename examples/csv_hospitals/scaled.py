"""A network for columns with different units: years, mmHg, mg/dl."""

import torch
from torch import Tensor, nn


class ScaledMlp(nn.Module):
    """[N, columns] -> one logit per row, [N]. Centres and scales are constants, not statistics of a silo's data."""

    centres: Tensor
    scales: Tensor

    def __init__(self, centres: list[float], scales: list[float], hidden: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.tensor(centres), persistent=False)  # not saved, not exchanged
        self.register_buffer("scales", torch.tensor(scales), persistent=False)
        self.layers = nn.Sequential(nn.Linear(len(centres), hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - self.centres) / self.scales).squeeze(-1)
