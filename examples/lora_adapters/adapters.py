"""Low-rank adapters (Hu et al. 2022, LoRA): a frozen linear layer plus the product of two thin matrices."""

import torch
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """W x + b + B A x, with W and b frozen. B starts at zero, so the layer's output is unchanged at first."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Adapted(nn.Sequential):
    """The network of pretrain.py with an adapter in every linear layer; its weights have the same names."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            nn.Flatten(), LoraLinear(64, 128, rank), nn.ReLU(), LoraLinear(128, 64, rank), nn.ReLU(),
            LoraLinear(64, 10, rank),
        )  # fmt: skip
