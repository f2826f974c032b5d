"""Central sets of grey images in gzipped IDX files, the format of MNIST: shared by mnist and fashion_mnist."""

from __future__ import annotations

import functools
import gzip
import zlib
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt

from fedmpi.components import PositiveInt, component
from fedmpi.data.central import central_source
from fedmpi.data.official import locate
from fedmpi.data.partition import PARTITIONS, Iid, Partition, divide
from fedmpi.errors import ConfigError
from fedmpi.types import Source


@component
class IdxImages:
    """60,000 + 10,000 images of 28x28 in ten classes; x is [1, 28, 28], standardised by fixed constants."""

    folder: ClassVar[str]  # name of the dataset and of its folder
    mean: ClassVar[float]  # of the training pixels in [0, 1]; constant, so that no silo's data influence another's
    std: ClassVar[float]  # of the same pixels

    silos: PositiveInt = 4
    """number of silos"""
    partition: Annotated[Partition, PARTITIONS] = Iid()
    """how samples are divided over silos"""
    seed: int | None = None
    """seed of the partition; null: the run's seed"""
    root: Path | None = None
    """folder that contains the dataset's folder; null: $FEDMPI_DATA, else ./data"""

    def source(self, seed: int) -> Source:
        """Silos "silo-0", ...; every rank reads all labels now, and all images with its first silo (central)."""
        labels = (self._read("train-labels-idx1-ubyte.gz"), self._read("t10k-labels-idx1-ubyte.gz"))
        parts = divide(self.partition, *labels, self.silos, seed if self.seed is None else self.seed)

        @functools.cache
        def images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
            return self._read("train-images-idx3-ubyte.gz"), self._read("t10k-images-idx3-ubyte.gz")

        for file in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
            locate(self.root, self.folder, file)  # report missing images now, not after placement
        return central_source(parts, labels, images, self._standardise, (1, 28, 28), 10)

    def _read(self, file: str) -> npt.NDArray[np.uint8]:
        return read_idx(locate(self.root, self.folder, file), self.folder)

    def _standardise(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(x / 255 - mean) / std, in place after the one conversion to float32."""
        x = pixels.astype(np.float32)
        x -= np.float32(255 * self.mean)
        x /= np.float32(255 * self.std)
        return x


def read_idx(file: Path, dataset: str) -> npt.NDArray[np.uint8]:
    """The array in a gzipped IDX file of bytes. Raises ConfigError if the file is damaged or of another format."""
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{dataset}: {file} is damaged ({error}); remove it and fetch it again") from None
    num_axes = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data, ">u4", num_axes, offset=4) if len(data) >= 4 + 4 * num_axes else np.zeros(1)
    # An IDX header is two zero bytes, 8 for unsigned bytes, the number of axes, and each axis's length.
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * num_axes + shape.prod(dtype=np.int64):
        raise ConfigError(f"{dataset}: {file} is not an IDX file of bytes; remove it and fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape.astype(int))
