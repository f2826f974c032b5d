"""Central datasets, partitioned over silos: shared by digits, mnist and fashion_mnist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmpi.data.partition import Part
from fedmpi.types import Silo, SiloData, Source

Images = npt.NDArray[np.uint8]


def central_source(
    parts: Mapping[str, Part],
    labels: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    images: Callable[[], tuple[Images, Images]],
    scale: Callable[[Images], npt.NDArray[np.float32]],
    shape: tuple[int, ...],
    num_classes: int,
) -> Source:
    """The source of a partitioned dataset: `labels` and `images` are pairs (train, test).

    `images` is called when a silo is opened. Only samples of opened silos become float32; the whole set stays as bytes.
    """

    def tensors(which: int, rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        x = scale(images()[which][rows]).reshape(-1, *shape)
        return torch.from_numpy(x), torch.from_numpy(labels[which][rows].astype(np.int64))

    def open_silo(silo: str) -> SiloData:
        return SiloData(*tensors(0, parts[silo].train), *tensors(1, parts[silo].test))

    silos = tuple(Silo(id=silo, num_samples=len(part.train)) for silo, part in parts.items())
    return Source("classification", shape, num_classes, silos, open_silo, central=True)
