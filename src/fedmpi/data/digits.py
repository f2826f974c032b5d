"""Handwritten digits included in scikit-learn: 1797 images of 8x8, ten classes; no download needed."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from fedmpi.components import PositiveInt, component
from fedmpi.data.central import central_source
from fedmpi.data.partition import PARTITIONS, Iid, Partition, divide
from fedmpi.rng import generator
from fedmpi.types import Source

TEST_FRACTION = 0.2  # of every class
SPLIT_SEED = 0  # constant, so that the test set does not depend on the run's seed


@component
class Digits:
    """Digits by 43 writers (Alpaydin and Kaynak 1998, UCI "optical recognition", test part); x in [0, 1], [1, 8, 8]."""

    silos: PositiveInt = 4
    """number of silos"""
    partition: Annotated[Partition, PARTITIONS] = Iid()
    """how samples are divided over silos"""
    seed: int | None = None
    """seed of the partition; null: the run's seed"""

    def source(self, seed: int) -> Source:
        """Silos "silo-0", "silo-1", ...; every rank reads the whole set (central)."""
        pixels_N64, y_N = load()
        test = stratified(y_N)
        labels, images = (y_N[~test], y_N[test]), (pixels_N64[~test], pixels_N64[test])
        parts = divide(self.partition, *labels, self.silos, seed if self.seed is None else self.seed)
        return central_source(
            parts, labels, lambda: images, lambda x: x.astype(np.float32) / np.float32(16), (1, 8, 8), 10
        )


@functools.cache  # to parse the text takes as long as to train a round
def load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels 0 to 16 as uint8 [1797, 64] and labels [1797], read-only.

    Reads scikit-learn's file without importing scikit-learn, which takes longer than a short run.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            text = gzip.decompress(file.read_bytes()).decode()
            table = np.array(text.replace("\n", ",").rstrip(",").split(","), np.float32).reshape(-1, 65)
            break
    else:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        table = np.column_stack([bunch.data, bunch.target])
    pixels_N64, y_N = table[:, :64].astype(np.uint8), table[:, 64].astype(np.int64)
    pixels_N64.flags.writeable = y_N.flags.writeable = False
    return pixels_N64, y_N


def stratified(y_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Boolean mask [N] of the test samples: a fifth of every class."""
    rng = generator(SPLIT_SEED, purpose="digits test set")
    test = np.zeros(len(y_N), bool)
    for k in np.unique(y_N):
        rows = rng.permutation(np.flatnonzero(y_N == k))
        test[rows[: round(TEST_FRACTION * len(rows))]] = True
    return test
