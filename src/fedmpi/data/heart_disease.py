"""UCI heart disease: four hospitals, each one file and one silo; preprocessed exactly as in the FLamby benchmark, or
without looking at the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedmpi.components import component
from fedmpi.data.official import locate
from fedmpi.errors import ConfigError
from fedmpi.types import Silo, SiloData, Source

HOSPITALS = {  # silo: its file and its number of training samples
    "cleveland": ("processed.cleveland.data", 199),
    "hungary": ("processed.hungarian.data", 172),
    "switzerland": ("processed.switzerland.data", 30),
    "longbeach": ("processed.va.data", 85),
}
# The one-hot levels are constants; learning them from the data would need every hospital's file in one place.
LEVELS = {2: (2, 3, 4), 6: (1, 2)}  # column: levels; the first level (chest pain 1, resting ECG 0) gets no feature
NUMERIC = (0, 1, 3, 4, 5, 7, 8, 9)
DROPPED = (10, 11, 12)  # mostly missing outside Cleveland
CENTRE_SCALE = (  # round figures by the meaning of each column, not computed from any row
    *((55.0, 10.0), (0.5, 0.5), (130.0, 20.0), (240.0, 60.0)),  # age, sex, blood pressure [mmHg], cholesterol [mg/dl]
    *((0.5, 0.5), (140.0, 25.0), (0.5, 0.5), (1.0, 1.0)),  # blood sugar, heart rate [1/min], angina, ST depression [mm]
    *((0.5, 0.5),) * 5,  # one-hot
)


@component
class HeartDisease:
    """Fed-Heart-Disease (Ogier du Terrail et al. 2022, FLamby): 13 features, predicts a narrowed vessel; x is [13]."""

    root: Path | None = None
    """folder that contains heart_disease/; null: $FEDMPI_DATA, else ./data"""

    normalise: Literal["fitted", "fixed"] = "fitted"
    """fitted: by mean and deviation of a hospital's training rows, split stratified by labels, as FLamby does; fixed:
    by round constants, split without labels, so that no record changes others, as `privacy: record` needs"""

    def source(self, seed: int) -> Source:
        """Silos cleveland, hungary, switzerland, longbeach; opens no file. The split does not depend on the seed."""
        silos = tuple(Silo(id=silo, num_samples=num) for silo, (_, num) in HOSPITALS.items())
        return Source("binary", (13,), 1, silos, self._open, fitted=self.normalise == "fitted")

    def _open(self, silo: str) -> SiloData:
        """x float32 [N, 13], y float32 [N], rows in file order; normalised by the hospital's own training part or by
        constants."""
        x_ND, y_N = read(locate(self.root, "heart_disease", HOSPITALS[silo][0]))
        train, test = (np.sort(rows) for rows in shuffle_split(y_N, stratified=self.normalise == "fitted"))
        x, y = torch.from_numpy(x_ND), torch.from_numpy(y_N.astype(np.float32))
        if self.normalise == "fitted":
            std, mean = torch.std_mean(x[train], dim=0)
            x = (x - mean) / (std + 1e-9)
        else:
            mean, std = torch.tensor(CENTRE_SCALE).T
            x = (x - mean) / std
        return SiloData(x[train], y[train], x[test], y[test])


def read(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Features [N, 13], numeric ones first, and labels [N], without rows that lack a used value."""
    try:
        lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        table = np.array([[np.nan if v.strip() == "?" else float(v) for v in line] for line in lines])
        table = table[~np.isnan(np.delete(table, DROPPED, axis=1)).any(axis=1)]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"heart_disease: {path} is not as UCI has it ({error})") from None
    dummies = [table[:, column] == level for column, levels in LEVELS.items() for level in levels]
    x_ND = np.column_stack([table[:, NUMERIC], *dummies]).astype(np.float32)
    return x_ND, table[:, -1] > 0


def shuffle_split(y_N: npt.NDArray[np.bool_], stratified: bool = True) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Indices for training and for testing, as scikit-learn's `train_test_split` returns them for the benchmark's
    arguments: train_size=0.66, test_size=1-0.66, random_state=43, `stratified` if both classes have more than 2
    samples.

    Reimplemented because importing scikit-learn takes longer than a run. numpy's RandomState is stable across versions.
    """
    rng = np.random.RandomState(43)
    num_train, num_test = int(0.66 * len(y_N)), int(np.ceil((1 - 0.66) * len(y_N)))
    num_C = np.bincount(y_N, minlength=2)
    if not stratified or num_C.min() <= 2:
        order = rng.permutation(len(y_N))
        return order[num_test : num_test + num_train], order[:num_test]
    train_C = _shares(num_C, num_train, rng)
    test_C = _shares(num_C - train_C, num_test, rng)
    train, test = [], []
    for k in range(2):
        rows = np.flatnonzero(y_N == k)[rng.permutation(num_C[k])]
        train.append(rows[: train_C[k]])
        test.append(rows[train_C[k] : train_C[k] + test_C[k]])
    return np.concatenate(train), np.concatenate(test)


def _shares(num_C: npt.NDArray[Any], num: int, rng: np.random.RandomState) -> npt.NDArray[np.int64]:
    """`num` samples over two classes in proportion; a sample left by rounding goes to the larger remainder."""
    exact = num_C / num_C.sum() * num
    whole: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    if whole.sum() < num:
        remainder = exact - whole
        ties = np.flatnonzero(remainder == remainder.max())
        whole[rng.choice(ties, 1, replace=False)] += 1  # draws only on a tie, as scikit-learn does
    return whole
