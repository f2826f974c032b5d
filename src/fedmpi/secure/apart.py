"""Sums of silos that are jobs of their own, as their federation sees them: the messages of protocol.py have summed and
unmasked them before anything else reads them (jobs/sums.py, jobs/masking.py). So nothing is masked here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np

from fedmpi.secure.masks import Masks
from fedmpi.secure.noise import NoiseShares
from fedmpi.secure.ring import Ring


class Apart:
    """The ring and the threshold of a federation's sums, and the figures of the last one.

    Attributes: figures (the sums of the silos' hidden figures, for the next table that is shared; None: none).
    """

    apart: ClassVar[bool] = True

    def __init__(self, num_silos: int, ring: Ring, threshold: int) -> None:
        self.ring, self.threshold, self._num_silos = ring, threshold, num_silos
        self.noise: NoiseShares | None = None
        self.figures: np.ndarray | None = None

    def masks(self, what: str, silos: Collection[str], bits: int) -> Masks:
        """No masks."""
        return Masks([], bits)

    def objection(self, silos: Sequence[str]) -> str:
        """Why there is no sum of these silos; empty if there is one."""
        if len(silos) >= self.threshold:
            return ""
        return f"{len(silos)} updates are usable, and secure.threshold is {self.threshold}: nothing was revealed"

    def alone(self) -> str:
        """What a silo can compute of others at worst, as text; empty if that is the sum of two silos or more."""
        if self.threshold > 2:
            return ""
        return "with secure.threshold: 2 each of two silos sees the other's update; take 3 or more, or more silos"

    # ------------------------------------------------------------ figures (records.table.Cover)

    def on(self, values: np.ndarray) -> np.ndarray:
        """Nothing: this process has no silo's figures."""
        return np.zeros_like(values)

    def off(self, summed: np.ndarray) -> np.ndarray:
        """The sums of the figures; 0 if there are none."""
        figures, self.figures = self.figures, None
        return summed if figures is None else figures

    def width(self, num: int) -> int:
        """Numbers that `on` gives for so many figures."""
        return num
