"""Partitions: divide one central dataset over silos.

A partition gives every silo its own training and test samples. The official test set is divided in each silo's training
proportions. So every sample belongs to exactly one silo, a silo is tested on the mixture it trains on, and the pooled
test set is the whole official one.

Shapes in names: `N` training samples, `M` test samples, `C` classes, `K` silos.

>>> y_train_N, y_test_M = np.repeat(np.arange(4), 50), np.repeat(np.arange(4), 10)
>>> parts = divide(Labels(labels=2), y_train_N, y_test_M, 4, seed=0)
>>> {silo: np.unique(y_train_N[part.train]).tolist() for silo, part in parts.items()}
{'silo-0': [0, 1], 'silo-1': [0, 1], 'silo-2': [0, 2], 'silo-3': [1, 3]}
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmpi.components import Family, NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.rng import generator

Ints = npt.NDArray[Any]  # of any integer type
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Rng = np.random.Generator
MAX_DRAWS = 1000  # draws of proportions before a partition reports that min_samples cannot be met


class Part(NamedTuple):
    """One silo's samples, as sorted indices into the training set and into the test set."""

    train: IntArray
    test: IntArray


class Partition:
    """Divides labels over silos. Members implement `split`."""

    overlaps: ClassVar[bool] = False  # whether silos may share training samples

    @abstractmethod
    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """Returns one part per silo; every training and every test index must be in exactly one part."""
        ...


@component
class Iid(Partition):
    """Shuffles, then cuts into equal parts (McMahan et al. 2017, section 3, "IID")."""

    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """Parts whose sizes differ by at most one."""
        return _by_size(np.full(num_silos, 1 / num_silos), y_train_N, y_test_M, rng)


@component
class Quantity(Partition):
    """Sizes from Dirichlet(beta), labels iid (Li et al. 2022, NIID-Bench, "quantity skew").

    Drawn again, at most 1000 times, until every silo has `min_samples`.
    """

    beta: PositiveFloat = 0.5
    """Dirichlet concentration; smaller is more unequal"""
    min_samples: NonNegativeInt = 10
    """minimum number of training samples per silo"""

    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """Parts of unequal size."""

        def draw() -> tuple[FloatArray, IntArray]:
            shares_K = rng.dirichlet(np.full(num_silos, self.beta))
            return shares_K, np.diff(_bounds(shares_K, len(y_train_N)))

        return _by_size(_draw_until(draw, self.min_samples, num_silos), y_train_N, y_test_M, rng)


@component
class Dirichlet(Partition):
    """Divides each class by Dirichlet(alpha) (Hsu et al. 2019, in the form of Li et al. 2022, NIID-Bench).

    For every class k, p_k ~ Dir_K(alpha), and silo j gets the share p_kj of the class; drawn again, at most 1000 times,
    until every silo has `min_samples`. As in NIID-Bench's code (not its paper), a silo that has N/K samples gets
    nothing of later classes, which keeps sizes comparable; `cap: false` disables that. Deviation: the test set is
    divided by the same p; NIID-Bench keeps one central test set. Hsu et al. instead draw a class mixture per silo, with
    equal sizes; the kind of skew is the same, the sizes are not.
    """

    alpha: PositiveFloat = 0.5
    """Dirichlet concentration; smaller is more skewed"""
    min_samples: NonNegativeInt = 10
    """minimum number of training samples per silo"""
    cap: bool = True
    """a silo with N/K samples gets nothing of later classes"""

    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """Parts with unequal labels and sizes."""
        num_C = np.bincount(y_train_N, minlength=_num_classes(y_train_N, y_test_M))

        def draw() -> tuple[FloatArray, IntArray]:
            shares_CK = np.zeros((len(num_C), num_silos))
            sizes_K = np.zeros(num_silos, np.int64)
            for k, num in enumerate(num_C):
                share_K = rng.dirichlet(np.full(num_silos, self.alpha))
                if self.cap and (open_K := share_K * (sizes_K < len(y_train_N) / num_silos)).sum() > 0:
                    share_K = open_K / open_K.sum()
                shares_CK[k] = share_K
                sizes_K += np.diff(_bounds(share_K, num))
            return shares_CK, sizes_K

        return _by_class(_draw_until(draw, self.min_samples, num_silos), y_train_N, y_test_M, rng)


@component
class Labels(Partition):
    """Each silo has exactly `labels` labels (Li et al. 2022, NIID-Bench, "#C=k").

    Silo i gets label i mod C, then further, different labels at random; the samples of a label are divided randomly
    and equally over the silos that have it. Deviation: as long as a label has no owner, random picks are among those
    labels, so that no sample is left out with fewer silos than labels. (The shards of sorted data of McMahan et al.
    2017 are the older form; a shard may span two labels.)
    """

    labels: PositiveInt = 2
    """number of different labels per silo"""

    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """Parts with few labels each."""
        num_classes = _num_classes(y_train_N, y_test_M)
        if self.labels > num_classes:
            raise ConfigError(f"partition labels: {self.labels} labels a silo, but there are only {num_classes}")
        if self.labels * num_silos < num_classes:
            raise ConfigError(
                f"partition labels: {num_silos} silos of {self.labels} labels leave some of {num_classes} without owner"
            )
        owns_CK = np.zeros((num_classes, num_silos))
        owns_CK[np.arange(num_silos) % num_classes, np.arange(num_silos)] = 1
        for silo in range(num_silos):
            for _ in range(self.labels - 1):
                no_owner = np.flatnonzero(owns_CK.sum(axis=1) == 0)
                others = np.flatnonzero(owns_CK[:, silo] == 0)
                owns_CK[rng.choice(no_owner if len(no_owner) else others), silo] = 1
        return _by_class(owns_CK / owns_CK.sum(axis=1, keepdims=True), y_train_N, y_test_M, rng)


@component
class Sorted(Partition):
    """Sorts by label and cuts into equal consecutive parts: most silos have one label, some two.

    The non-iid setting of Karimireddy et al. 2022 (Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing,
    experiments), where honest silos divide the sorted set. The last `mixed` silos represent that benchmark's hostile
    ones: each gets copies of a random 1/(K - mixed) of the whole set and no test samples, so that the honest silos
    still hold every sample.

    Deviations: samples of one label are assigned at random, not in file order; a silo is tested on its own labels, not
    on one central test set.
    """

    overlaps: ClassVar[bool] = True

    mixed: NonNegativeInt = 0
    """number of silos, the last ones, that hold copies of samples of all labels"""

    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """The sorted parts, then the mixed ones."""
        num_sorted = num_silos - self.mixed
        if num_sorted < 1:
            raise ConfigError(
                f"partition sorted: {self.mixed} mixed silos leave none of {num_silos} for the sorted set"
            )
        num_C = np.bincount(y_train_N, minlength=_num_classes(y_train_N, y_test_M))
        ends_C, bounds = np.cumsum(num_C)[:, None], _bounds(np.full(num_sorted, 1 / num_sorted), len(y_train_N))
        overlap_CK = np.minimum(ends_C, bounds[1:]) - np.maximum(ends_C - num_C[:, None], bounds[:-1])
        # A class without training samples has no place in the order: every silo gets an equal share of its tests.
        shares_CK = np.where(num_C[:, None], overlap_CK.clip(0) / num_C.clip(1)[:, None], 1 / num_sorted)
        parts = _by_class(shares_CK, y_train_N, y_test_M, rng)
        order_N, nothing = rng.permutation(len(y_train_N)), np.zeros(0, np.int64)
        copies = [order_N[k % num_sorted :: num_sorted] for k in range(self.mixed)]
        return parts + [Part(np.sort(train), nothing) for train in copies]


def divide(partition: Partition, y_train_N: Ints, y_test_M: Ints, num_silos: int, seed: int) -> dict[str, Part]:
    """Each silo's part by id, "silo-0", ...; numbers are zero-padded, so that text order is number order.

    Raises ConfigError if a silo has no training samples, or if a partition loses or repeats a sample. A partition that
    `overlaps` may give a training sample to several silos, but only once to each.
    """
    parts = partition.split(y_train_N, y_test_M, num_silos, generator(seed, purpose="partition"))
    named = {f"silo-{k:0{len(str(num_silos - 1))}d}": part for k, part in enumerate(parts)}
    for silo, part in named.items():
        if not len(part.train):
            raise ConfigError(f"silo {silo} has no samples ({len(y_train_N)} over {num_silos} silos by {partition})")
    for y, pieces in ((y_train_N, [p.train for p in parts]), (y_test_M, [p.test for p in parts])):
        found = np.sort(np.concatenate(pieces))
        if y is y_train_N and partition.overlaps and all(len(np.unique(p)) == len(p) for p in pieces):
            found = np.unique(found)
        if not np.array_equal(found, np.arange(len(y))):
            raise ConfigError(f"partition {partition} does not give every sample to exactly one silo")
    return named


def _num_classes(*ys: Ints) -> int:
    return int(max(y.max(initial=0) for y in ys)) + 1


def _bounds(share_K: FloatArray, num: int) -> IntArray:
    """Limits of each silo's piece of `num` samples: K+1 numbers from 0 to `num`."""
    inner = np.rint(np.cumsum(share_K)[:-1] * num).astype(np.int64)
    return np.concatenate([[0], np.minimum(inner, num), [num]])


def _draw_until(draw: Callable[[], tuple[FloatArray, IntArray]], min_samples: int, num_silos: int) -> FloatArray:
    """The first drawn shares that give every silo `min_samples` training samples; else raises ConfigError."""
    for _ in range(MAX_DRAWS):
        shares, sizes_K = draw()
        if sizes_K.min() >= min_samples:
            return shares
    few = int(sizes_K.argmin())
    raise ConfigError(
        f"silo {few} of {num_silos} has {sizes_K[few] or 'no'} samples, min_samples is {min_samples}, after "
        f"{MAX_DRAWS} draws; take fewer silos, a lower min_samples or a milder skew"
    )


def _by_size(share_K: FloatArray, y_train_N: Ints, y_test_M: Ints, rng: Rng) -> list[Part]:
    """Parts of these sizes, independent of labels."""
    pieces = [np.split(rng.permutation(len(y)), _bounds(share_K, len(y))[1:-1]) for y in (y_train_N, y_test_M)]
    return [Part(np.sort(train), np.sort(test)) for train, test in zip(*pieces, strict=True)]


def _by_class(shares_CK: FloatArray, y_train_N: Ints, y_test_M: Ints, rng: Rng) -> list[Part]:
    """Parts with these shares [C, K] of every class."""

    def dealt(y: Ints) -> list[IntArray]:
        pieces = [
            np.split(rng.permutation(np.flatnonzero(y == k)), _bounds(share_K, int((y == k).sum()))[1:-1])
            for k, share_K in enumerate(shares_CK)
        ]
        return [np.sort(np.concatenate(of_silo)) for of_silo in zip(*pieces, strict=True)]

    return [Part(train, test) for train, test in zip(dealt(y_train_N), dealt(y_test_M), strict=True)]


PARTITIONS = Family(
    "partition",
    {"iid": Iid, "dirichlet": Dirichlet, "labels": Labels, "sorted": Sorted, "quantity": Quantity},
    Partition,
    defaults=True,
)


@component
class Shared(Partition):
    """Another partition plus training samples that all silos share (Zhao et al. 2018, section 4: data sharing).

    Federated learning with non-IID data. The shared set G is `share` of all training samples, equally many of every
    class; each silo gets a random `portion` of it besides its own samples.

    Deviations: the paper sets G apart; here its samples are copied from the silos, which keep them. A silo's weight n_k
    counts its shared samples too. The parts are those of the other partition with the same seed.

    >>> y_train_N, y_test_M = np.repeat(np.arange(4), 50), np.repeat(np.arange(4), 10)
    >>> parts = divide(Shared(partition=Labels(labels=1), share=0.04), y_train_N, y_test_M, 4, seed=0)
    >>> np.bincount(y_train_N[parts["silo-2"].train]).tolist()
    [2, 2, 50, 2]
    """

    overlaps: ClassVar[bool] = True

    partition: Annotated[Partition, PARTITIONS] = Iid()
    """how samples are divided before sharing"""
    share: PositiveFraction = 0.05
    """beta: size of the shared set, as a share of all training samples"""
    portion: PositiveFraction = 1.0
    """alpha: share of the shared set that each silo gets"""

    def split(self, y_train_N: Ints, y_test_M: Ints, num_silos: int, rng: Rng) -> list[Part]:
        """The other partition's parts, with shared training samples added."""
        parts = self.partition.split(y_train_N, y_test_M, num_silos, rng)
        classes = np.unique(y_train_N)
        each = round(self.share * len(y_train_N) / len(classes))  # a smaller class gives all its samples
        common = np.concatenate([rng.permutation(np.flatnonzero(y_train_N == k))[:each] for k in classes])
        size = round(self.portion * len(common))
        given = [rng.permutation(common)[:size] for _ in parts]
        return [Part(np.union1d(part.train, more), part.test) for part, more in zip(parts, given, strict=True)]


PARTITIONS.members["shared"] = Shared
