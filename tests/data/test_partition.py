"""Partitions of central sets: coverage, skew, one clear line for every mistake."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedmpi.data import PARTITIONS
from fedmpi.data.partition import Dirichlet, Iid, Labels, Part, Partition, Quantity, Shared, Sorted, divide
from fedmpi.errors import ConfigError

Y_TRAIN, Y_TEST = np.repeat(np.arange(10), 300), np.repeat(np.arange(10), 50)


@pytest.mark.parametrize("num_silos", [1, 2, 7])
@pytest.mark.parametrize(
    "cls", [*(c for c in PARTITIONS.members.values() if c is not Shared), lambda: Labels(labels=6)]
)
def test_partition_gives_every_sample_to_one_silo_and_depends_on_the_seed_alone(cls, num_silos):
    partition = Labels(labels=10) if cls is Labels and num_silos == 1 else cls()
    if isinstance(partition, Labels) and partition.labels * num_silos < 10:
        with pytest.raises(ConfigError, match="without owner"):
            divide(partition, Y_TRAIN, Y_TEST, num_silos, seed=3)
        return
    parts = divide(partition, Y_TRAIN, Y_TEST, num_silos, seed=3)
    assert list(parts) == [f"silo-{k}" for k in range(num_silos)]
    assert np.array_equal(np.sort(np.concatenate([p.train for p in parts.values()])), np.arange(3000))
    assert np.array_equal(np.sort(np.concatenate([p.test for p in parts.values()])), np.arange(500))
    again, other = (divide(partition, Y_TRAIN, Y_TEST, num_silos, seed=s) for s in (3, 4))
    assert all(np.array_equal(parts[s].train, again[s].train) for s in parts)
    assert all(np.array_equal(parts[s].test, again[s].test) for s in parts)
    if num_silos > 1 and not (cls is Sorted and 10 % num_silos == 0):  # it cuts no class
        assert not all(np.array_equal(parts[s].train, other[s].train) for s in parts)
    # A silo is tested on its own mixture: its share of every class is the same in both sets, up to rounding.
    if type(partition) in (Dirichlet, Labels, Sorted):
        for p in parts.values():
            share_train = np.bincount(Y_TRAIN[p.train], minlength=10) / 300
            share_test = np.bincount(Y_TEST[p.test], minlength=10) / 50
            assert np.abs(share_train - share_test).max() <= 1 / 50 + 1 / 300
    else:
        assert all(abs(len(p.train) / 3000 - len(p.test) / 500) <= 1 / 500 + 1 / 3000 for p in parts.values())


@pytest.mark.parametrize("portion", [1.0, 0.5])
def test_shared_samples_come_on_top_of_another_partition(portion):
    inner = Labels(labels=2)
    alone = divide(inner, Y_TRAIN, Y_TEST, 7, seed=3)
    parts = divide(Shared(partition=inner, share=0.1, portion=portion), Y_TRAIN, Y_TEST, 7, seed=3)
    common = np.arange(3000)
    for silo, part in parts.items():
        assert np.array_equal(part.test, alone[silo].test)
        assert np.isin(alone[silo].train, part.train).all() and len(np.unique(part.train)) == len(part.train)
        given = np.setdiff1d(part.train, alone[silo].train)
        assert 0 < len(given) <= 300 * portion
        if portion == 1:  # all hold the same 30 of every class
            assert (np.bincount(Y_TRAIN[part.train], minlength=10) >= 30).all()
            common = np.intersect1d(common, part.train)
    if portion == 1:
        assert (np.bincount(Y_TRAIN[common], minlength=10) == 30).all()
    again = divide(Shared(partition=inner, share=0.1, portion=portion), Y_TRAIN, Y_TEST, 7, seed=3)
    assert all(np.array_equal(parts[silo].train, again[silo].train) for silo in parts)


@pytest.mark.parametrize("mixed", [0, 2])
def test_a_sorted_set_is_cut_into_consecutive_parts_and_mixed_silos_hold_copies_of_all_labels(mixed):
    """Against the sampler of Karimireddy et al.'s benchmark in plain numpy: sort by label, cut into equal parts."""
    y_train, y_test = Y_TRAIN[np.random.default_rng(0).permutation(3000)], Y_TEST[::-1]
    parts = list(divide(Sorted(mixed=mixed), y_train, y_test, 8 + mixed, seed=3).values())
    cut = np.sort(y_train).reshape(8, -1)
    assert [np.sort(y_train[p.train]).tolist() for p in parts[:8]] == cut.tolist()
    assert np.array_equal(np.sort(np.concatenate([p.train for p in parts[:8]])), np.arange(3000))
    assert all(set(y_test[p.test]) == set(labels) for p, labels in zip(parts, cut, strict=False))
    for p in parts[8:]:
        assert len(p.train) == len(np.unique(p.train)) == 375 and len(p.test) == 0
        assert np.abs(np.bincount(y_train[p.train], minlength=10) - 37.5).max() < 25
    assert len(np.unique(np.concatenate([[-1], *(p.train for p in parts[8:])]))) == 1 + 375 * mixed


def test_a_class_that_nobody_trains_on_is_tested_by_all_sorted_silos_alike():
    parts = divide(Sorted(), Y_TRAIN[Y_TRAIN != 4], Y_TEST, 5, seed=0).values()
    assert [np.sum(Y_TEST[p.test] == 4) for p in parts] == [10] * 5


def test_what_two_silos_both_hold_is_refused_where_nothing_is_shared():
    class Twice(Shared):
        def split(self, y_train_N, y_test_M, num_silos, rng):
            parts = super().split(y_train_N, y_test_M, num_silos, rng)
            return [Part(np.concatenate([p.train, p.train[:1]]), p.test) for p in parts]

    with pytest.raises(ConfigError, match="does not give every sample to exactly one silo"):
        divide(Twice(), Y_TRAIN, Y_TEST, 3, seed=0)


def mixtures(partition, num_silos=6):
    """Label mixture [silo, class] and sizes."""
    parts = divide(partition, Y_TRAIN, Y_TEST, num_silos, seed=0).values()
    counts = np.array([np.bincount(Y_TRAIN[p.train], minlength=10) for p in parts])
    return counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=1)


def skew(partition):
    """Mean total variation distance between the silos' mixtures and the whole set's."""
    return np.abs(mixtures(partition)[0] - 0.1).sum(axis=1).mean() / 2


def test_partitions_are_as_skewed_as_they_say():
    assert set(mixtures(Iid())[1]) == {500}
    assert skew(Iid()) < 0.06
    assert skew(Iid()) < skew(Dirichlet(alpha=20)) < 0.15 < skew(Dirichlet(alpha=1)) < skew(Dirichlet(alpha=0.05))
    assert skew(Quantity(beta=0.5)) < 0.15
    assert mixtures(Quantity(beta=0.5))[1].max() > 3 * mixtures(Quantity(beta=0.5))[1].min()
    assert mixtures(Quantity(beta=1000))[1].max() < 1.3 * mixtures(Quantity(beta=1000))[1].min()
    for labels in (2, 3, 10):
        assert ((mixtures(Labels(labels=labels))[0] > 0).sum(axis=1) == labels).all()


def test_the_cap_keeps_sizes_comparable():
    capped, free = (mixtures(Dirichlet(alpha=0.1, cap=cap))[1] for cap in (True, False))
    assert capped.max() <= 3000 / 6 + 300 < free.max()


@pytest.mark.parametrize("partition", [Dirichlet(alpha=0.3, min_samples=400), Quantity(beta=0.5, min_samples=100)])
def test_partition_draws_again_until_every_silo_has_min_samples(partition):
    assert mixtures(partition)[1].min() >= partition.min_samples
    assert mixtures(dataclasses.replace(partition, min_samples=0))[1].min() < partition.min_samples


class Loses(Partition):
    def split(self, y_train, y_test, num_silos, rng):
        return [Part(np.array([k]), np.array([k])) for k in range(num_silos)]


@pytest.mark.parametrize(
    ("partition", "num_silos", "says"),
    [
        (Iid(), 11, r"silo silo-\d\d has no samples"),
        (Quantity(min_samples=0, beta=0.01), 10, "silo silo-. has no samples"),
        (Dirichlet(), 5, "silo . of 5 has .* samples, min_samples is 10"),
        (Labels(labels=11), 2, "11 labels a silo, but there are only 10"),
        (Labels(), 4, "4 silos of 2 labels leave some of 10 without owner"),
        (Sorted(mixed=3), 3, "3 mixed silos leave none of 3"),
        (Loses(), 2, "does not give every sample to exactly one silo"),
    ],
)
def test_a_partition_that_cannot_be_says_so(partition, num_silos, says):
    with pytest.raises(ConfigError, match=says):
        divide(partition, np.arange(10), np.arange(10), num_silos, seed=0)
