"""A dataset: two Gaussian clouds per silo, at a different position for every silo.

A dataset is a component with `source(seed)`; `Source` and `SiloData` are in fedmpi/types.py. `open` is called on the
rank that hosts the silo, so it reads only that silo's files. Files in HDF5, npz or CSV need no code: see `data: {name:
files, ...}`.

    data: {name: "examples.extending.dataset:Clouds", silos: 3, samples: 60}
    model: {name: logistic}
"""

import torch

from fedmpi.components import PositiveInt, component
from fedmpi.types import Silo, SiloData, Source


@component
class Clouds:
    """Classification of points in four dimensions."""

    silos: PositiveInt = 4
    """Number of silos."""
    samples: PositiveInt = 100
    """Samples per silo; a fifth of them are test samples."""

    def source(self, seed):
        names = [f"cloud-{i}" for i in range(self.silos)]

        def open_silo(name):
            rng = torch.Generator().manual_seed(1000 * seed + names.index(name))
            y = torch.arange(self.samples) % 2
            x = torch.randn(self.samples, 4, generator=rng) + 2 * y[:, None] + torch.randn(4, generator=rng)
            test = self.samples // 5
            return SiloData(x[test:], y[test:], x[:test], y[:test])

        silos = tuple(Silo(name, self.samples - self.samples // 5) for name in names)
        return Source("classification", shape=(4,), num_classes=2, silos=silos, open=open_silo)
