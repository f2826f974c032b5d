"""The vocabulary that rooms share: what a dataset hands out, what a silo contributes.

Shapes in names: `P` shared parameters, `K` silos of the federation, `N` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch

from fedmpi.layout import Layout, Normaliser

Task = Literal["classification", "binary", "regression", "next_token"]


@dataclass(frozen=True)
class Silo:
    """One data owner, known by a stable id: what is declared of it before its data are opened."""

    id: str
    num_samples: int | None = None  # training samples; None: learned by the rank that opens it
    host: str | None = None  # the only host that may open it; None: any


class SiloData(NamedTuple):
    """One silo's samples, in memory. Classification and next_token have int64 targets, the others float32."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


@dataclass(frozen=True)
class Source:
    """A dataset that is ready to be opened, silo by silo."""

    task: Task
    shape: tuple[int, ...]  # of one sample
    num_classes: int  # classes, or symbols of a vocabulary; 1 for binary, the number of targets for regression
    silos: tuple[Silo, ...]  # the federation, in an order that is the same on every rank
    open: Callable[[str], SiloData]  # by silo id; reads that silo's files and no other's unless `central`
    central: bool = False  # one set that was partitioned: every rank reads all of it
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of opened silos whose files name what x holds


class Dataset(Protocol):
    """A component that knows where samples come from."""

    def source(self, seed: int) -> Source:
        """The dataset's silos; reads no silo's samples unless the set is central. Raises DataMissing."""
        ...


@dataclass(frozen=True)
class Auxiliary:
    """A vector as long as the parameters that travels with the delta, in the same exchange (a control variate, ...).

    The server keeps it and every silo reads it; after a round it is `decay * old + gain * m`, where m is the mean of
    what the silos sent: over those that were heard, by what each stands for (`cohort`), or 1/K of their sum, K being
    all silos of the federation (`population`). Whatever an aggregator makes of the deltas' weights, these stay. It
    starts at 0.
    """

    name: str
    normaliser: Normaliser = "cohort"
    decay: float = 1.0
    gain: float = 1.0


@dataclass
class Contribution:
    """What a silo hands to the exchange: named vectors, contribution["delta"] and those of the rule's auxiliaries,
    which are views of one. They are valid until the next silo of the rank trains."""

    silo: str
    round: int
    weight: float
    vector_Q: torch.Tensor  # the delta [P], and behind it the rule's auxiliary vectors, each [P]
    loss: float  # mean training loss over the targets visited this round
    num_samples: int  # visited this round
    num_steps: int
    normalizer: float | None = None  # how many gradients the delta holds, |a_k|_1 of FedNova; None: num_steps
    start_loss: float = 0.0  # of the global parameters on the training samples, where the aggregator asks for it
    num_targets: int | None = None  # visited this round that `loss` is the mean of; None: num_samples
    norm: float = math.nan  # of the delta, as the last check has found it
    layout: Layout | None = None  # of the vector; None: it is the delta and nothing else

    def __getitem__(self, name: str) -> torch.Tensor:
        """The vector of that name, a view."""
        layout = Layout.whole(len(self.vector_Q)) if self.layout is None else self.layout
        return layout.of(self.vector_Q, name)

    @property
    def num_gradients(self) -> float:
        """How many gradients the delta holds: the normaliser, or the steps taken."""
        return self.normalizer or self.num_steps

    @property
    def counted(self) -> int:
        """How many targets the loss is the mean of."""
        return self.num_samples if self.num_targets is None else self.num_targets
