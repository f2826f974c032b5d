"""A network in two parts: a pretrained body and a new head."""

from torch import Tensor, nn


def body() -> nn.Sequential:
    """Images [N, 1, 8, 8] -> features [N, 128]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip


class NewHead(nn.Module):
    """The body and one linear layer. A frozen body is not trained."""

    def __init__(self, classes: int, frozen: bool) -> None:
        super().__init__()
        self.body = body().requires_grad_(not frozen)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
