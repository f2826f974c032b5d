"""A dataset, a network and a metric for images with a class per pixel: 0 background, 1 disc, 2 ring."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmpi.components import PositiveInt, component
from fedmpi.types import Silo, SiloData, Source

SIDE, CLASSES = 24, 3  # pixels; classes of a pixel
NOISE = {"ct-1": 0.2, "ct-2": 0.3, "mr-1": 0.4}  # scanners, and the standard deviation of their noise


@component
class Scanners:
    """Synthetic images. To read files, read those of one scanner in `open`: a rank opens only its own silos."""

    num_images: PositiveInt = 40
    """Training images per scanner; there are half as many test images."""

    def source(self, seed: int) -> Source:
        """The silos, before any is opened."""
        silos = tuple(Silo(scanner, self.num_images) for scanner in NOISE)
        return Source("classification", (1, SIDE, SIDE), CLASSES, silos, self.open)

    def open(self, scanner: str) -> SiloData:
        """A scanner's images [N, 1, 24, 24] and classes [N, 24, 24]."""
        rng = torch.Generator().manual_seed(list(NOISE).index(scanner))
        num = self.num_images
        x, y = draw(num + num // 2, NOISE[scanner], rng)
        return SiloData(x[:num], y[:num], x[num:], y[num:])


def draw(num: int, noise: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images, each with a disc and a ring of about equal brightness."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centres = torch.rand(num, 2, 2, 1, 1, generator=rng) * 6 + torch.tensor([[5.0], [13.0]]).reshape(2, 1, 1, 1)
    distance = ((rows - centres[:, :, 0]) ** 2 + (columns - centres[:, :, 1]) ** 2).sqrt()  # to disc and to ring
    disc, ring = distance[:, 0] < 3.5, (distance[:, 1] - 4).abs() < 1
    classes = torch.where(ring, 2, disc.long())
    images = (classes > 0).float() + noise * torch.randn(classes.shape, generator=rng)
    return images[:, None], classes


class ConvNet(nn.Module):
    """Logits for every pixel: [N, 1, H, W] -> [N, classes, H, W]. Group normalization has no statistics to share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2), nn.GroupNorm(2, width), nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=4, dilation=2), nn.GroupNorm(2, width), nn.ReLU(),
            nn.Conv2d(width, CLASSES, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Dice:
    """Dice score: 2 |predicted and true| / (|predicted| + |true|), the mean over disc and ring.

    The state is counts, so the score of all scanners is that of all their pixels, for any placement on ranks.
    """

    maximize: ClassVar[bool] = True

    def init(self) -> Tensor:
        return torch.zeros(CLASSES, 2, dtype=torch.int64)  # by class: pixels in both; predicted plus true ones

    def update(self, state: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        predicted, true = outputs.argmax(-1), targets  # fedmpi hands over rows: logits [M, classes], classes [M]
        counts = [
            torch.stack([((predicted == c) & (true == c)).sum(), (predicted == c).sum() + (true == c).sum()])
            for c in range(CLASSES)
        ]
        return state + torch.stack(counts)

    def compute(self, state: Tensor) -> float:
        both, either = state[1:].double().unbind(1)
        return float((2 * both / either).mean())
