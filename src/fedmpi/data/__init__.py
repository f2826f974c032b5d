"""Datasets: where the silos' samples come from. A dataset is its own file and one line at the bottom of this one."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from fedmpi.comm import SoloComm
from fedmpi.components import Family
from fedmpi.data.digits import Digits
from fedmpi.data.fashion_mnist import FashionMnist
from fedmpi.data.files import Files, FileSilo
from fedmpi.data.heart_disease import HeartDisease
from fedmpi.data.mnist import Mnist
from fedmpi.data.official import fetch, locate, root_of, verify
from fedmpi.data.partition import PARTITIONS, Partition
from fedmpi.data.shakespeare import Shakespeare
from fedmpi.errors import ConfigError
from fedmpi.types import Dataset, SiloData, Source

__all__ = ["DATASETS", "PARTITIONS", "FileSilo", "Partition", "Row", "check", "fetch", "locate", "root_of", "verify"]


class Row(NamedTuple):
    """One silo in the output of `fedmpi data check`."""

    silo: str
    num_train: int
    num_test: int
    targets: str  # training labels as "label:samples", the targets' mean, or the symbols used


def check(dataset: Dataset, seed: int = 0, only: Collection[str] | None = None) -> list[Row]:
    """Checks checksums, shapes and declared sizes; returns one row per silo.

    `only`: ids of silos to open, if the files of others are elsewhere. Raises ConfigError or DataMissing.
    """
    verify(DATASETS.name_of(dataset), getattr(dataset, "root", None))  # only datasets that come as files have a root
    source = dataset.source(seed)
    if source.shared is not None and not source.shared.known:
        for silo in source.silos:
            if only is None or silo.id in only:
                source.shared.read(silo.id)
        source.shared.agree(SoloComm())
    rows = []
    for silo in source.silos:
        if only is None or silo.id in only:
            data = source.open(silo.id)
            if silo.num_samples not in (None, len(data.x_train)):
                raise ConfigError(f"silo '{silo.id}' declares {silo.num_samples} samples, has {len(data.x_train)}")
            rows.append(Row(silo.id, len(data.x_train), len(data.x_test), _targets(source, data)))
    return rows


def _targets(source: Source, data: SiloData) -> str:
    if source.task == "regression":
        return f"mean {data.y_train.mean().item():.4g}"
    counts = torch.bincount(data.y_train.flatten().long(), minlength=2).tolist()
    if source.task == "next_token":
        return f"{sum(c > 0 for c in counts)} of {source.num_classes} symbols"
    return " ".join(f"{label}:{count}" for label, count in enumerate(counts) if count)


DATASETS = Family(
    "dataset",
    {
        "digits": Digits,
        "fashion_mnist": FashionMnist,
        "mnist": Mnist,
        "heart_disease": HeartDisease,
        "shakespeare": Shakespeare,
        "files": Files,
    },
    Dataset,
)
